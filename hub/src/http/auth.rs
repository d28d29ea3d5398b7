//! Who may ask: whoever shows the bearer token. It is made at the first start, kept in a file that only its owner
//! reads, and compared without telling by the time it takes how much of it was right.

use std::fs::OpenOptions;
use std::io::{self, Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use super::problem::Refused;

/// The name of the token's file in the data directory.
pub const TOKEN_FILE: &str = "admin.token";

/// The most bytes that a token's file may have.
const MAX_TOKEN_FILE_BYTES: u64 = 4096;

/// The random bits of a new token.
const TOKEN_RANDOM_BYTES: usize = 32;

/// Who may use the interface.
#[derive(Clone, Debug)]
pub enum Auth {
    /// Everybody who reaches it. Only for loopback.
    Off,
    /// Whoever shows the token.
    Token(TokenDigest),
}

/// The digest of a token: enough to recognise it, useless to whoever reads it.
#[derive(Clone, Debug)]
pub struct TokenDigest(Arc<blake3::Hash>);

impl TokenDigest {
    /// The digest of `token`.
    pub fn of(token: &str) -> Self {
        Self(Arc::new(blake3::hash(token.as_bytes())))
    }

    /// Whether `token` is the one. Comparing hashes takes the same time wherever they differ.
    fn matches(&self, token: &str) -> bool {
        *self.0 == blake3::hash(token.as_bytes())
    }
}

/// Reads the token of a data directory, or makes it.
///
/// # Errors
/// Where the file cannot be read or made, is empty, or may be read by others than its owner.
pub fn admin_token(data: &Path) -> io::Result<String> {
    let path = data.join(TOKEN_FILE);
    match read_token(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let token = fresh_token()?;
            let mut file =
                OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path)?;
            file.write_all(format!("{token}\n").as_bytes())?;
            file.sync_all()?;
            std::fs::File::open(data)?.sync_all()?;
            Ok(token)
        }
        other => other,
    }
}

/// Reads a token from a file that only its owner may read.
///
/// # Errors
/// As [`admin_token`], and `NotFound`.
pub fn read_token(path: &Path) -> io::Result<String> {
    let file = std::fs::File::open(path)?;
    let mode = file.metadata()?.permissions().mode();
    if mode & 0o077 != 0 {
        return Err(io::Error::new(
            io::ErrorKind::PermissionDenied,
            format!(
                "{} may be read by others (mode {:o}): chmod 600 it",
                path.display(),
                mode & 0o777
            ),
        ));
    }
    let mut text = String::new();
    file.take(MAX_TOKEN_FILE_BYTES).read_to_string(&mut text)?;
    let token = text.trim();
    if token.is_empty() {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("{} holds no token: remove it and start the hub again", path.display()),
        ));
    }
    Ok(token.to_owned())
}

fn fresh_token() -> io::Result<String> {
    let mut random = [0_u8; TOKEN_RANDOM_BYTES];
    std::fs::File::open("/dev/urandom")?.read_exact(&mut random)?;
    Ok(random.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// Lets a request through, or answers 401.
pub(super) async fn require(State(auth): State<Auth>, request: Request, next: Next) -> Response {
    let Auth::Token(wanted) = &auth else { return next.run(request).await };
    let shown = request
        .headers()
        .get(header::AUTHORIZATION)
        .and_then(|value| value.to_str().ok())
        .and_then(|value| value.split_once(' '))
        .filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"))
        .map(|(_, token)| token.trim());
    let why = match shown {
        Some(token) if wanted.matches(token) => return next.run(request).await,
        Some(_) => "this token is not the hub's: that stands in admin.token in its data directory",
        None => "a bearer token is needed: it stands in admin.token in the hub's data directory",
    };
    Refused::new(StatusCode::UNAUTHORIZED, why).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_made_once_for_its_owner_only_and_read_back() {
        let dir = tempfile::tempdir().unwrap();
        let token = admin_token(dir.path()).unwrap();
        assert_eq!(token.len(), 2 * TOKEN_RANDOM_BYTES);
        assert_eq!(admin_token(dir.path()).unwrap(), token);
        let file = dir.path().join(TOKEN_FILE);
        assert_eq!(std::fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o644)).unwrap();
        assert!(admin_token(dir.path()).unwrap_err().to_string().contains("chmod 600"));
    }

    #[test]
    fn only_the_same_token_matches() {
        let digest = TokenDigest::of("secret");
        assert!(digest.matches("secret"));
        assert!(!digest.matches("secret ") && !digest.matches(""));
    }
}
