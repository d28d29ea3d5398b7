//! What the layer of a disk is put on: decided from what the database knows, before any file is touched. Whether the
//! parent's files are still what they were is found out by the chain, when the layer is made.

use crate::db::Parent;
use crate::model::BackupType;

/// What a new layer stands on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Base {
    /// Nothing; with the reason, where an incremental was asked for.
    Nothing(Option<String>),
    /// This layer.
    Layer(Parent),
}

/// Chooses the base for the disk with this key and size.
pub(super) fn choose(
    wanted: BackupType,
    latest: Option<&Parent>,
    key: i64,
    size_bytes: u64,
) -> Base {
    if wanted == BackupType::Full {
        return Base::Nothing(None);
    }
    let because = |reason: String| Base::Nothing(Some(reason));
    match latest {
        None => because("there is no completed backup of this disk in the repository".to_owned()),
        Some(parent) if parent.disk_key != key => because(format!(
            "the disk in this place had the key {} and has {key} now",
            parent.disk_key
        )),
        Some(parent) if parent.capacity_bytes > size_bytes => {
            because(format!("the disk shrank from {} to {size_bytes} bytes", parent.capacity_bytes))
        }
        Some(parent) => Base::Layer(parent.clone()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parent() -> Parent {
        Parent {
            disk_index: 0,
            disk_key: 2000,
            backup_id: "b".to_owned(),
            path: "p".to_owned(),
            capacity_bytes: 100,
            change_id: "c/1".to_owned(),
        }
    }

    #[test]
    fn an_incremental_stands_on_the_latest_layer_of_the_same_disk() {
        let parent = parent();
        for size in [100, 200] {
            let base = choose(BackupType::Incremental, Some(&parent), 2000, size);
            assert_eq!(base, Base::Layer(parent.clone()));
        }
    }

    #[test]
    fn a_full_stands_alone_without_needing_a_reason() {
        assert_eq!(choose(BackupType::Full, Some(&parent()), 2000, 100), Base::Nothing(None));
    }

    #[test]
    fn an_incremental_that_cannot_be_one_becomes_a_full_and_says_why() {
        for (latest, key, size, word) in [
            (None, 2000, 100, "no completed backup"),
            (Some(parent()), 2001, 100, "key"),
            (Some(parent()), 2000, 99, "shrank"),
        ] {
            match choose(BackupType::Incremental, latest.as_ref(), key, size) {
                Base::Nothing(Some(reason)) => assert!(reason.contains(word), "{reason}"),
                other => panic!("{other:?}"),
            }
        }
    }
}
