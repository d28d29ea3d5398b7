//! Change ids: the name of the state of one disk that a run sent. Parsing and printing only; where a state's digests
//! are kept is the digest file's affair.

use std::fmt;
use std::str::FromStr;

use uuid::Uuid;

/// What a change id of a bitmap source begins with.
const BITMAP_PREFIX: &str = "bitmap:";

/// Names one state of one disk: `{uuid}/{sequence}`.
///
/// The UUID is new for every state, so that two states never share a name, whichever chains they belong to. The
/// sequence counts the runs behind the state, for people who read it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct StateId {
    /// New for every state.
    pub uuid: Uuid,
    /// One more than that of the state before; 1 where there was none.
    pub sequence: u64,
}

/// What a run hands out for the state that it sent, and takes back as the previous one.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum ChangeId {
    /// `{uuid}/{sequence}`: the digests of the state are in the agent's state directory.
    Digests(StateId),
    /// `bitmap:{NAME}:{uuid}/{sequence}`: what changes after the state is in the source's dirty bitmap NAME.
    ///
    /// The agent cannot see since when a bitmap records. Whoever owns the source must see to it that, in the next
    /// run, the bitmap holds every change since the snapshot that this run read: by rotating or clearing it in the
    /// same step that takes a snapshot. This id only proves that the bitmap was there and that its name is the same.
    Bitmap {
        /// The bitmap's name.
        name: String,
        /// The state.
        state: StateId,
    },
}

/// A text that is no change id of this agent.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{text}' is no change id of this agent")]
pub struct ChangeIdError {
    /// What was given.
    pub text: String,
}

impl StateId {
    /// Names a new state that follows `previous`.
    pub fn following(previous: Option<StateId>) -> Self {
        let sequence = previous.map_or(0, |id| id.sequence).saturating_add(1);
        Self { uuid: Uuid::new_v4(), sequence }
    }
}

impl ChangeId {
    /// The state that it names.
    pub fn state(&self) -> StateId {
        match self {
            Self::Digests(state) | Self::Bitmap { state, .. } => *state,
        }
    }
}

impl fmt::Display for StateId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.uuid.hyphenated(), self.sequence)
    }
}

impl fmt::Display for ChangeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Digests(state) => state.fmt(f),
            Self::Bitmap { name, state } => write!(f, "{BITMAP_PREFIX}{name}:{state}"),
        }
    }
}

impl FromStr for StateId {
    type Err = ChangeIdError;

    fn from_str(text: &str) -> Result<Self, ChangeIdError> {
        let refused = || ChangeIdError { text: text.to_owned() };
        let (uuid, sequence) = text.split_once('/').ok_or_else(refused)?;
        let id = Self {
            uuid: Uuid::try_parse(uuid).map_err(|_| refused())?,
            sequence: sequence.parse().map_err(|_| refused())?,
        };
        // One spelling only: what differs in case, signs or leading zeros was not written by an agent.
        if id.to_string() == text { Ok(id) } else { Err(refused()) }
    }
}

impl FromStr for ChangeId {
    type Err = ChangeIdError;

    fn from_str(text: &str) -> Result<Self, ChangeIdError> {
        let refused = |_| ChangeIdError { text: text.to_owned() };
        match text.strip_prefix(BITMAP_PREFIX).and_then(|rest| rest.rsplit_once(':')) {
            Some((name, state)) if !name.is_empty() => {
                Ok(Self::Bitmap { name: name.to_owned(), state: state.parse().map_err(refused)? })
            }
            _ => Ok(Self::Digests(text.parse().map_err(refused)?)),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const UUID: &str = "0190f1c2-7e7e-4d9a-8f00-0123456789ab";

    #[test]
    fn what_no_agent_wrote_is_refused() {
        let upper = UUID.to_uppercase();
        for text in [
            String::new(),
            "52 de 99/12".into(),
            UUID.into(),
            format!("{UUID}/"),
            format!("{UUID}/-1"),
            format!("{UUID}/+1"),
            format!("{UUID}/01"),
            format!("{UUID}/1/1"),
            format!("{upper}/1"),
            format!("{UUID}/18446744073709551616"),
            format!("../{UUID}/1"),
            format!("bitmap::{UUID}/1"),
            "bitmap:name".into(),
        ] {
            assert!(text.parse::<ChangeId>().is_err(), "{text}");
        }
    }

    #[test]
    fn states_that_follow_the_same_one_differ() {
        let parent = StateId::following(None);
        let (one, other) = (StateId::following(Some(parent)), StateId::following(Some(parent)));
        assert_ne!(one, other);
        assert_eq!((parent.sequence, one.sequence, other.sequence), (1, 2, 2));
    }

    proptest! {
        #[test]
        fn a_change_id_is_parsed_back_from_how_it_is_shown(
            uuid in any::<u128>(), sequence in any::<u64>(), name in proptest::option::of("\\PC+"),
        ) {
            let state = StateId { uuid: Uuid::from_u128(uuid), sequence };
            let id = match name {
                Some(name) => ChangeId::Bitmap { name, state },
                None => ChangeId::Digests(state),
            };
            prop_assert_eq!(id.to_string().parse(), Ok(id));
        }
    }
}
