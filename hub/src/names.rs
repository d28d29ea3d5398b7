//! The names that the hub makes up. What a repository calls its files is the chain's business.

use jiff::Timestamp;
use uuid::Uuid;

/// The most bytes of a virtual machine's name that an id repeats.
const ID_NAME_BYTES: usize = 96;

/// An id for a new backup: `backup-{vm}-{YYYYMMDDTHHMMSS}-{uuid}`. The virtual machine's name is there for people:
/// whatever is not a letter, digit, `.`, `_` or `-` of ASCII becomes `_`.
pub(crate) fn backup_id(vm_name: &str, stamp: Timestamp) -> String {
    let name: String = vm_name
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-') { c } else { '_' })
        .take(ID_NAME_BYTES)
        .collect();
    format!("backup-{name}-{}-{}", stamp.strftime("%Y%m%dT%H%M%S"), Uuid::now_v7())
}

/// An identity that says nothing: for virtual machines, repositories and restores.
pub(crate) fn fresh_id(prefix: &str) -> String {
    format!("{prefix}-{}", Uuid::now_v7())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_repeats_the_name_in_letters_that_need_no_escape() {
        let id = backup_id("web/ü 1", Timestamp::UNIX_EPOCH);
        assert!(id.starts_with("backup-web___1-19700101T000000-"), "{id}");
    }

    #[test]
    fn ids_of_the_same_second_differ_and_long_names_are_cut() {
        let (a, b) = (
            backup_id(&"x".repeat(500), Timestamp::UNIX_EPOCH),
            backup_id(&"x".repeat(500), Timestamp::UNIX_EPOCH),
        );
        assert_ne!(a, b);
        assert!(a.len() <= 191);
    }
}
