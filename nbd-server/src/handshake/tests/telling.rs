//! Long lists, told in pieces.

use super::*;

const EXPORTS: usize = 3000;

/// Many exports with long descriptions, each with many contexts.
struct Many {
    /// How many there are.
    count: usize,
    /// Whether each is removed once it is told, and the one behind it.
    melts: bool,
}

fn name(number: usize) -> String {
    format!("export{number:06}")
}

impl ExportDirectory for Many {
    fn next(&mut self, after: Option<&str>) -> Option<(String, String)> {
        let told = after.map(|name| name["export".len()..].parse::<usize>().unwrap());
        let step = if self.melts { 2 } else { 1 };
        let next = told.map_or(0, |told| told + step);
        (next < self.count).then(|| (name(next), "x".repeat(MAX_STRING_BYTES)))
    }

    fn look_up(&mut self, name: &str) -> Result<ExportFacts, Unavailable> {
        let context = |number| MetaContext::Source(format!("x:{number:04000}").into());
        let contexts = (0..100).map(context).collect();
        let facts = Two::new().look_up("disk")?;
        Ok(ExportFacts { name: name.to_owned(), contexts, ..facts })
    }

    fn enter(&mut self, name: &str) -> Result<ExportFacts, Unavailable> {
        self.look_up(name)
    }

    fn is_shutting_down(&self) -> bool {
        false
    }
}

/// The replies to an option, and the longest that was to be sent at once, in bytes.
fn told(exports: &mut Many, options: &[Vec<u8>]) -> (Vec<Reply>, usize) {
    let mut input = BytesMut::from(&FIXED.to_be_bytes()[..]);
    input.put_slice(&options.concat());
    let mut machine = Handshake::new(&Limits::default());
    let (mut all, mut longest) = (Vec::new(), 0);
    loop {
        let mut out = BytesMut::new();
        let progress = machine.step(&mut input, exports, &mut out);
        longest = longest.max(out.len());
        all.extend(replies(&out));
        if progress != Progress::Again {
            assert_eq!(progress, Progress::Need(OPTION_BYTES));
            return (all, longest);
        }
    }
}

#[test]
fn a_list_of_any_length_is_told_whole_and_in_short_pieces() {
    let lists = [bytes_of(option::LIST, &[]), bytes_of(option::LIST, &[])];
    for (melts, expected) in [(false, EXPORTS), (true, EXPORTS / 2)] {
        let (replies, longest) = told(&mut Many { count: EXPORTS, melts }, &lists);
        assert!(longest <= 25 << 10, "{longest}");
        let (first, second) = replies.split_at(replies.len() / 2);
        assert_eq!(first, second);
        assert_eq!(first.len(), expected + 1);
        assert_eq!(first.last(), Some(&(option::LIST, reply::ACK, Vec::new())));
        let servers = first.iter().filter(|one| (one.0, one.1) == (option::LIST, reply::SERVER));
        assert!(servers.map(|one| &one.2[4..16]).is_sorted());
    }
    let (replies, _) = told(&mut Many { count: 0, melts: false }, &lists[..1]);
    assert_eq!(replies, [(option::LIST, reply::ACK, Vec::new())]);
}

#[test]
fn contexts_are_told_in_short_pieces_too_and_are_selected_all() {
    let all: Vec<_> = (0..60).map(|number| format!("x:{number:04000}")).collect();
    let all: Vec<_> = all.iter().map(String::as_bytes).collect();
    let options = [
        bytes_of(option::STRUCTURED_REPLY, &[]),
        bytes_of(option::LIST_META_CONTEXT, &queries(b"disk", &[])),
        bytes_of(option::SET_META_CONTEXT, &queries(b"disk", &all)),
    ];
    let (replies, longest) = told(&mut Many { count: 1, melts: false }, &options);
    assert!(longest <= 25 << 10, "{longest}");
    let of = |option: u32| replies.iter().filter(move |one| one.0 == option);
    assert_eq!(of(option::LIST_META_CONTEXT).count(), 100 + 1);
    assert_eq!(of(option::SET_META_CONTEXT).count(), 60 + 1);
    for option in [option::LIST_META_CONTEXT, option::SET_META_CONTEXT] {
        assert_eq!(of(option).next_back().map(|one| one.1), Some(reply::ACK));
    }
}
