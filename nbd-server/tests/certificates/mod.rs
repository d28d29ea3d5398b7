//! Certificates made for one test, in directories as QEMU, libnbd, nbdkit and we read them.

use std::path::Path;

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, date_time_ymd,
};
use tempfile::TempDir;

/// Somebody who issues certificates.
pub(crate) struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

impl Authority {
    pub(crate) fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, "authority of a test");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let pem = params.self_signed(&key).unwrap().pem();
        Self { issuer: Issuer::new(params, key), pem }
    }

    /// A certificate and its key, as PEM.
    pub(crate) fn issue(&self, subject: &Subject) -> (String, String) {
        let mut params = CertificateParams::new(subject.hosts.clone()).unwrap();
        params.distinguished_name.push(DnType::CommonName, subject.common_name);
        params.key_usages =
            vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
        params.extended_key_usages = vec![subject.purpose.clone()];
        params.not_before = date_time_ymd(2020, 1, 1);
        params.not_after = date_time_ymd(if subject.expired { 2021 } else { 2120 }, 1, 1);
        let key = KeyPair::generate().unwrap();
        (params.signed_by(&key, &self.issuer).unwrap().pem(), key.serialize_pem())
    }

    /// A directory with the authority alone.
    pub(crate) fn directory(&self) -> TempDir {
        let directory = tempfile::tempdir().unwrap();
        self.trust_in(directory.path());
        directory
    }

    /// Makes those who read the directory trust this authority.
    pub(crate) fn trust_in(&self, directory: &Path) {
        std::fs::write(directory.join("ca-cert.pem"), &self.pem).unwrap();
    }

    /// Adds a certificate to a directory, as the side that its purpose says.
    pub(crate) fn add(&self, directory: &Path, subject: &Subject) {
        let (certificate, key) = self.issue(subject);
        let side = match subject.purpose {
            ExtendedKeyUsagePurpose::ServerAuth => "server",
            _ => "client",
        };
        std::fs::write(directory.join(format!("{side}-cert.pem")), certificate).unwrap();
        std::fs::write(directory.join(format!("{side}-key.pem")), key).unwrap();
    }

    /// A directory with certificates of this authority for both sides: a server on this host, and a client.
    pub(crate) fn both_sides(&self) -> TempDir {
        let directory = self.directory();
        self.add(directory.path(), &Subject::server());
        self.add(directory.path(), &Subject::client("client of a test"));
        directory
    }
}

/// Whom a certificate is for.
#[derive(Clone)]
pub(crate) struct Subject {
    pub(crate) common_name: &'static str,
    /// DNS names and IP addresses.
    pub(crate) hosts: Vec<String>,
    pub(crate) purpose: ExtendedKeyUsagePurpose,
    pub(crate) expired: bool,
}

impl Subject {
    /// A server on this host.
    pub(crate) fn server() -> Self {
        Self {
            common_name: "server of a test",
            hosts: ["localhost", "127.0.0.1", "::1"].map(str::to_owned).to_vec(),
            purpose: ExtendedKeyUsagePurpose::ServerAuth,
            expired: false,
        }
    }

    /// A client with this common name, and the DNS name "client.example".
    pub(crate) fn client(common_name: &'static str) -> Self {
        Self {
            common_name,
            hosts: vec!["client.example".to_owned()],
            purpose: ExtendedKeyUsagePurpose::ClientAuth,
            expired: false,
        }
    }
}
