//! Whether what an agent says it sent is what arrived: its report against the counters of the disk's export. Pure; an agent
//! that wrote elsewhere, or nothing, must not end as a backup that reads as zeros.

use agent::DiskReport;
use nbd_server::Counters;

use super::work::Reason;

/// Refuses a report that the counters do not bear out.
///
/// `alone` says that nothing lies below the layer. Then, and where the agent says that it sent everything, every byte of
/// the disk has to be told: as data, as zeros, or as discarded.
///
/// # Errors
/// What was reported and what arrived.
pub(super) fn check(
    report: &DiskReport,
    counters: &Counters,
    alone: bool,
    export: &str,
) -> Result<(), Reason> {
    if counters.connections == 0 {
        return Err(format!("the agent reports the disk as sent but never opened export {export}"));
    }
    let missing = |what: &str, reported: u64, arrived: u64| {
        Err(format!(
            "the agent reports {reported} bytes of {what} but only {arrived} arrived through export {export}"
        ))
    };
    if report.data_bytes_sent > counters.bytes_written {
        return missing("data", report.data_bytes_sent, counters.bytes_written);
    }
    let zeroed = counters.bytes_zeroed.saturating_add(counters.bytes_trimmed);
    if report.zero_bytes_sent > zeroed {
        return missing("zeros", report.zero_bytes_sent, zeroed);
    }
    let told = counters.bytes_written.saturating_add(zeroed);
    if (alone || !report.incremental) && told < report.capacity_bytes {
        return missing("a full disk", report.capacity_bytes, told);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(data: u64, zeros: u64, incremental: bool) -> DiskReport {
        DiskReport {
            disk_index: 0,
            disk_key: 2000,
            source: String::new(),
            capacity_bytes: 100,
            change_id: "c".to_owned(),
            incremental,
            full_reason: None,
            read_bytes: 100,
            changed_bytes: data + zeros,
            data_bytes_sent: data,
            zero_bytes_sent: zeros,
            wire_bytes: data,
            elapsed_ms: 0,
        }
    }

    fn counters(connections: u64, written: u64, zeroed: u64) -> Counters {
        let mut counters = Counters::default();
        counters.connections = connections;
        counters.bytes_written = written;
        counters.bytes_zeroed = zeroed;
        counters
    }

    #[test]
    fn what_arrived_whole_is_taken() {
        check(&report(60, 40, false), &counters(1, 60, 40), true, "e").unwrap();
        check(&report(5, 0, true), &counters(2, 5, 0), false, "e").unwrap();
        // An incremental without changes.
        check(&report(0, 0, true), &counters(1, 0, 0), false, "e").unwrap();
        // Sent twice, after a connection was lost.
        check(&report(60, 40, false), &counters(2, 90, 40), true, "e").unwrap();
    }

    #[test]
    fn what_did_not_arrive_is_refused_with_both_numbers() {
        for (report, counters, alone, words) in [
            (report(0, 0, true), counters(0, 0, 0), false, "never opened export e"),
            (report(60, 0, true), counters(1, 59, 0), false, "60 bytes of data but only 59"),
            (report(60, 40, true), counters(1, 60, 1), false, "40 bytes of zeros but only 1"),
            (
                report(60, 39, true),
                counters(1, 60, 39),
                true,
                "100 bytes of a full disk but only 99",
            ),
            (
                report(60, 0, false),
                counters(1, 60, 0),
                false,
                "100 bytes of a full disk but only 60",
            ),
        ] {
            let refused = check(&report, &counters, alone, "e").unwrap_err();
            assert!(refused.contains(words), "{refused}");
        }
    }
}
