//! How a disk is to be run: what it is compared with, what is kept for the next run, and why not less. Pure: the
//! digest file that a plan names is opened by its user, who falls back to a full where that fails.

use crate::change_id::{ChangeId, StateId};

/// What is known before a plan is made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Ask<'a> {
    /// The change id of the target's backing, if it has one.
    pub(crate) previous: Option<&'a str>,
    /// Whether everything was asked for.
    pub(crate) full: bool,
    /// The bitmap that the source names, and whether the server offers it.
    pub(crate) bitmap: Option<(&'a str, bool)>,
}

/// What a disk is compared with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Start {
    /// Nothing: everything is sent.
    Full {
        /// Why, where changes only were asked for.
        reason: Option<FullReason>,
    },
    /// The digests of a state.
    Digests(StateId),
    /// Nothing: the source's bitmap tells what changed.
    Bitmap,
}

/// What is kept so that the next run can tell changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Record {
    /// A digest file.
    Digests,
    /// Nothing: the source's bitmap will tell.
    Bitmap,
}

/// How a disk is to be run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Plan {
    /// What it is compared with.
    pub(crate) start: Start,
    /// What is kept.
    pub(crate) record: Record,
    /// The state before, as far as its name is known.
    pub(crate) previous: Option<StateId>,
}

/// Why everything is sent although only changes were asked for.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum FullReason {
    /// The previous change id is not one of ours.
    #[error("the previous change id '{text}' is not one of this agent")]
    ForeignChangeId { text: String },
    /// The bitmap that should tell the changes is not there.
    #[error(
        "the source does not offer the dirty bitmap '{name}' that the previous change id names"
    )]
    NoBitmap { name: String },
    /// The source names another bitmap.
    #[error(
        "the previous change id belongs to the dirty bitmap '{previous}', the source names '{named}'"
    )]
    OtherBitmap { previous: String, named: String },
    /// The digest file is not usable.
    #[error("the baseline is not usable: {why}")]
    Baseline { why: String },
    /// The disk is smaller than it was.
    #[error("the disk shrank from {old_bytes} to {disk_bytes} bytes")]
    Shrunk { old_bytes: u64, disk_bytes: u64 },
}

/// Decides how a disk is run.
///
/// A bitmap is trusted only where the previous change id was handed out with that bitmap in sight: digests bridge the
/// run in which it first appears.
pub(crate) fn plan(ask: &Ask<'_>) -> Plan {
    let record = match ask.bitmap {
        Some((_, true)) => Record::Bitmap,
        _ => Record::Digests,
    };
    let Some(text) = ask.previous else {
        return Plan { start: Start::Full { reason: None }, record, previous: None };
    };
    let previous = text.parse::<ChangeId>().ok();
    let start = match &previous {
        _ if ask.full => Start::Full { reason: None },
        None => because(FullReason::ForeignChangeId { text: text.to_owned() }),
        Some(ChangeId::Digests(state)) => Start::Digests(*state),
        Some(ChangeId::Bitmap { name, .. }) => match ask.bitmap {
            Some((named, true)) if named == name => Start::Bitmap,
            Some((named, _)) if named != name => {
                because(FullReason::OtherBitmap { previous: name.clone(), named: named.to_owned() })
            }
            _ => because(FullReason::NoBitmap { name: name.clone() }),
        },
    };
    Plan { start, record, previous: previous.map(|id| id.state()) }
}

fn because(reason: FullReason) -> Start {
    Start::Full { reason: Some(reason) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn any_change_id() -> impl Strategy<Value = Option<String>> {
        let state = (any::<u128>(), any::<u64>())
            .prop_map(|(uuid, sequence)| StateId { uuid: uuid::Uuid::from_u128(uuid), sequence });
        let id = (state, proptest::option::of("[ab]")).prop_map(|(state, name)| match name {
            Some(name) => ChangeId::Bitmap { name, state }.to_string(),
            None => state.to_string(),
        });
        proptest::option::of(prop_oneof![4 => id, 1 => Just("foreign".to_owned())])
    }

    proptest! {
        #[test] // The rules, each as its own sentence.
        fn a_plan_never_trusts_what_it_has_not_seen(
            previous in any_change_id(), full in any::<bool>(),
            named in proptest::option::of(("[ab]", any::<bool>())),
        ) {
            let bitmap = named.as_ref().map(|(name, offered)| (name.as_str(), *offered));
            let plan = plan(&Ask { previous: previous.as_deref(), full, bitmap });
            let id = previous.as_deref().and_then(|text| text.parse::<ChangeId>().ok());
            let offered = bitmap.filter(|(_, offered)| *offered).map(|(name, _)| name);
            prop_assert_eq!(plan.record == Record::Bitmap, offered.is_some());
            prop_assert_eq!(plan.previous, id.as_ref().map(ChangeId::state));
            let asked_for_changes = previous.is_some() && !full;
            match &plan.start {
                Start::Full { reason } => prop_assert_eq!(reason.is_some(), asked_for_changes),
                Start::Digests(state) => {
                    prop_assert!(asked_for_changes);
                    prop_assert_eq!(id, Some(ChangeId::Digests(*state)));
                }
                Start::Bitmap => {
                    prop_assert!(asked_for_changes);
                    let trusted = matches!(id, Some(ChangeId::Bitmap { name, .. }) if Some(name.as_str()) == offered);
                    prop_assert!(trusted);
                }
            }
        }
    }

    #[test]
    fn a_baseline_that_is_known_is_used() {
        let state = StateId::following(None);
        let text = state.to_string();
        let ask = Ask { previous: Some(&text), full: false, bitmap: None };
        assert_eq!(plan(&ask).start, Start::Digests(state));
        // A bitmap that appears is recorded, but what it missed is found by the digests.
        let ask = Ask { bitmap: Some(("b", true)), ..ask };
        let expected =
            Plan { start: Start::Digests(state), record: Record::Bitmap, previous: Some(state) };
        assert_eq!(plan(&ask), expected);
        let text = ChangeId::Bitmap { name: "b".into(), state }.to_string();
        let ask = Ask { previous: Some(&text), ..ask };
        assert_eq!(plan(&ask).start, Start::Bitmap);
    }
}
