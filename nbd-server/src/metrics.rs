//! The numbers of a server as Prometheus reads them. Where they are asked for is told in `exposition`.
//!
//! Source: Prometheus, "Text-based format", version 0.0.4.

use std::fmt::Write;
use std::time::SystemTime;

use crate::clients::ConnectionStatus;
use crate::counters::{Counters, Latency, RequestKind};
use crate::export::ExportStatus;
use crate::server::Server;

/// A text that grows by families of metrics. Writing to a `String` does not fail.
#[derive(Default)]
struct Page(String);

impl Page {
    /// Begins a family.
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        let _ = write!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}\n");
    }

    /// One value of it.
    fn value(&mut self, name: &str, labels: &[(&str, &str)], value: impl std::fmt::Display) {
        self.0.push_str(name);
        for (index, (label, text)) in labels.iter().enumerate() {
            let _ = write!(self.0, "{}{label}=\"", if index == 0 { "{" } else { "," });
            for char in text.chars() {
                match char {
                    '\\' => self.0.push_str("\\\\"),
                    '"' => self.0.push_str("\\\""),
                    '\n' => self.0.push_str("\\n"),
                    other => self.0.push(other),
                }
            }
            self.0.push('"');
        }
        let end = if labels.is_empty() { "" } else { "}" };
        let _ = writeln!(self.0, "{end} {value}");
    }

    fn export_gauges(&mut self, exports: &[ExportStatus]) {
        type Of = fn(&ExportStatus) -> u64;
        let families: [(&str, &str, &str, Of); 6] = [
            ("nbd_export_size_bytes", "gauge", "The size.", |one| one.size_bytes),
            ("nbd_export_read_only", "gauge", "1 where changes are refused.", |one| {
                one.read_only.into()
            }),
            ("nbd_export_connections", "gauge", "Connections now.", |one| {
                u64::try_from(one.connections).unwrap_or(u64::MAX)
            }),
            ("nbd_export_connections_total", "counter", "Connections so far.", |one| {
                one.counters.connections
            }),
            ("nbd_export_in_flight", "gauge", "Requests under way now.", |one| {
                one.counters.in_flight
            }),
            ("nbd_export_errors_total", "counter", "Requests that failed.", |one| {
                one.counters.errors
            }),
        ];
        for (name, kind, help, of) in families {
            self.family(name, kind, help);
            for one in exports {
                self.value(name, &[("export", &one.name)], of(one));
            }
        }
        let name = "nbd_export_last_error_timestamp_seconds";
        self.family(name, "gauge", "When a request failed last.");
        for one in exports {
            let at = one.last_error.as_ref().map(|error| error.at);
            let since = at.and_then(|at| at.duration_since(SystemTime::UNIX_EPOCH).ok());
            if let Some(since) = since {
                self.value(name, &[("export", &one.name)], since.as_secs_f64());
            }
        }
    }

    fn export_counters(&mut self, exports: &[ExportStatus]) {
        let name = "nbd_export_requests_total";
        self.family(name, "counter", "Requests that were answered, by what they asked for.");
        for one in exports {
            for kind in RequestKind::ALL {
                let labels = [("export", &*one.name), ("kind", kind.name())];
                self.value(name, &labels, one.counters.by_kind.get(kind));
            }
        }
        let name = "nbd_export_bytes_total";
        self.family(name, "counter", "Bytes of requests that succeeded, by what was done to them.");
        for one in exports {
            for (what, bytes) in bytes(&one.counters) {
                self.value(name, &[("export", &one.name), ("kind", what)], bytes);
            }
        }
        let name = "nbd_export_request_duration_seconds";
        self.family(name, "histogram", "How long the device worked on a request.");
        for one in exports {
            let latency = &one.counters.latency;
            let bucket = format!("{name}_bucket");
            let mut sum = 0;
            for (bound, count) in Latency::BOUNDS.iter().zip(latency.buckets) {
                sum += count;
                let bound = bound.as_secs_f64().to_string();
                self.value(&bucket, &[("export", &one.name), ("le", &bound)], sum);
            }
            self.value(&bucket, &[("export", &one.name), ("le", "+Inf")], latency.count());
            let of_export = [("export", &*one.name)];
            self.value(&format!("{name}_sum"), &of_export, latency.sum.as_secs_f64());
            self.value(&format!("{name}_count"), &of_export, latency.count());
        }
    }

    fn connections(&mut self, connections: &[ConnectionStatus]) {
        type Of = fn(&Counters) -> u64;
        let families: [(&str, &str, &str, Of); 4] = [
            ("nbd_connection_requests_total", "counter", "Requests that were answered.", |one| {
                one.requests
            }),
            ("nbd_connection_errors_total", "counter", "Requests that failed.", |one| one.errors),
            ("nbd_connection_in_flight", "gauge", "Requests under way now.", |one| one.in_flight),
            ("nbd_connection_bytes_total", "counter", "Bytes of requests that succeeded.", |one| {
                bytes(one).iter().map(|(_, bytes)| bytes).sum()
            }),
        ];
        for (name, kind, help, of) in families {
            self.family(name, kind, help);
            for one in connections {
                let (id, peer) = (one.id.to_string(), one.peer.to_string());
                let export = one.export.as_deref().unwrap_or_default();
                let labels = [("connection", &*id), ("peer", &*peer), ("export", export)];
                self.value(name, &labels, of(&one.counters));
            }
        }
    }
}

/// Bytes by what was done to them.
fn bytes(counters: &Counters) -> [(&'static str, u64); 4] {
    [
        ("read", counters.bytes_read),
        ("write", counters.bytes_written),
        ("write_zeroes", counters.bytes_zeroed),
        ("trim", counters.bytes_trimmed),
    ]
}

impl Server {
    /// What [`Server::exports`] and [`Server::clients`] tell, as text that Prometheus reads.
    pub fn prometheus(&self) -> String {
        let mut page = Page::default();
        let limits = self.limits();
        let number = |number: usize| u64::try_from(number).unwrap_or(u64::MAX);
        for (name, help, value) in [
            ("nbd_connections", "Connections now.", number(self.connections())),
            ("nbd_connections_limit", "Connections there may be.", number(limits.connections)),
            ("nbd_memory_bytes", "Memory for what is in flight now.", self.memory_in_use()),
            ("nbd_memory_limit_bytes", "Memory there may be for it.", limits.memory_bytes),
        ] {
            page.family(name, "gauge", help);
            page.value(name, &[], value);
        }
        let exports = self.exports();
        page.export_gauges(&exports);
        page.export_counters(&exports);
        page.connections(&self.clients());
        page.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_label_cannot_end_before_its_end() {
        let mut page = Page::default();
        page.value("x", &[("a", "1\"} 2\n\\"), ("b", "ä")], 7);
        assert_eq!(page.0, "x{a=\"1\\\"} 2\\n\\\\\",b=\"ä\"} 7\n");
    }
}
