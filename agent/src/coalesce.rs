//! From what each block needs to the requests that say so: neighbours that need the same become one run. Pure.

use block::ByteRange;

/// The longest run of zeros that one request clears, in bytes.
pub(crate) const MAX_ZERO_RUN_BYTES: u64 = 1 << 30;

/// What the target must be told about some bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Need {
    /// Nothing: it has them.
    Nothing,
    /// The bytes.
    Data,
    /// That they are zeros.
    Zeros,
}

/// A run of bytes that one request tells the target about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    /// Which bytes.
    pub(crate) range: ByteRange,
    /// [`Need::Data`] or [`Need::Zeros`].
    pub(crate) need: Need,
}

/// Joins neighbours. Takes ranges in rising order, with or without gaps.
#[derive(Debug)]
pub(crate) struct Coalescer {
    pending: Option<Run>,
    max_data_bytes: u64,
}

impl Coalescer {
    /// Runs of data end after `max_data_bytes`, those of zeros after [`MAX_ZERO_RUN_BYTES`].
    pub(crate) fn new(max_data_bytes: u64) -> Self {
        Self { pending: None, max_data_bytes: max_data_bytes.max(1) }
    }

    /// Adds the next range; what is complete by that goes to `out`.
    pub(crate) fn push(&mut self, range: ByteRange, need: Need, out: &mut Vec<Run>) {
        if range.is_empty() {
            return;
        }
        let start = match self.pending {
            Some(run) if run.need == need && run.range.end() == range.start() => run.range.start(),
            _ => {
                out.extend(self.pending.take());
                range.start()
            }
        };
        let max = match need {
            Need::Nothing => return,
            Need::Data => self.max_data_bytes,
            Need::Zeros => MAX_ZERO_RUN_BYTES,
        };
        let mut rest = ByteRange::between(start, range.end());
        while rest.len() > max {
            let cut = rest.start() + max;
            out.push(Run { range: ByteRange::between(rest.start(), cut), need });
            rest = ByteRange::between(cut, rest.end());
        }
        self.pending = Some(Run { range: rest, need });
    }

    /// Ends a pending run of data: its bytes do not outlive the piece that they were read in.
    pub(crate) fn end_piece(&mut self, out: &mut Vec<Run>) {
        out.extend(self.pending.take_if(|run| run.need == Need::Data));
    }

    /// Ends whatever is pending.
    pub(crate) fn finish(mut self, out: &mut Vec<Run>) {
        out.extend(self.pending.take());
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn any_need() -> impl Strategy<Value = Need> {
        prop_oneof![Just(Need::Nothing), Just(Need::Data), Just(Need::Zeros)]
    }

    #[test]
    fn a_hole_longer_than_a_request_is_cut() {
        let mut out = Vec::new();
        let mut coalescer = Coalescer::new(1 << 20);
        coalescer.push(ByteRange::between(0, 1 << 30), Need::Zeros, &mut out);
        coalescer.push(ByteRange::between(1 << 30, (5 << 29) + 1), Need::Zeros, &mut out);
        coalescer.finish(&mut out);
        let ends: Vec<_> = out.iter().map(|run| run.range.end()).collect();
        assert_eq!(ends, [1 << 30, 2 << 30, (5 << 29) + 1]);
    }

    proptest! {
        #[test] // Each byte keeps its need, and no two runs could have been one.
        fn runs_say_of_each_byte_what_was_said_of_it(
            steps in proptest::collection::vec((0u64..40, any_need(), any::<bool>()), 0..60), max in 1u64..100,
        ) {
            let (mut model, mut out, mut at) = (Vec::new(), Vec::new(), 0);
            let mut coalescer = Coalescer::new(max);
            for (len, need, _) in &steps {
                coalescer.push(ByteRange::between(at, at + len), *need, &mut out);
                model.extend((0..*len).map(|_| *need));
                at += len;
            }
            coalescer.finish(&mut out);
            let mut told = vec![Need::Nothing; model.len()];
            for run in &out {
                prop_assert!(run.need != Need::Data || run.range.len() <= max);
                for at in run.range.start()..run.range.end() {
                    told[usize::try_from(at).unwrap()] = run.need;
                }
            }
            prop_assert_eq!(told, model);
            for pair in out.windows(2) {
                let full = pair[0].need == Need::Data && pair[0].range.len() == max;
                let apart = pair[0].range.end() < pair[1].range.start();
                prop_assert!(pair[0].range.end() <= pair[1].range.start());
                prop_assert!(pair[0].need != pair[1].need || apart || full);
            }
        }
    }
}
