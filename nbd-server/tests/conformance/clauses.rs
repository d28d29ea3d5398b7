//! Keeps `CLAUSES.md` and `DEMANDS.md` true: every test that they name is there, every test of this suite is named in the
//! former, and the latter leaves no sentence of the document out.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// The names of the tests in the sources below a directory.
fn tests_below(dir: &Path) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    let mut rest = vec![dir.to_owned()];
    while let Some(dir) = rest.pop() {
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                rest.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = std::fs::read_to_string(&path).unwrap();
                // Not whole, so that they are not found here.
                let marks = [concat!("#[", "test]"), concat!("#[", "tokio::test")];
                let after = marks.iter().flat_map(|mark| text.split(mark).skip(1));
                let name = |text: &str| {
                    let (_, name) = text.split_once("fn ")?;
                    name.split_once('(').map(|(name, _)| name.to_owned())
                };
                names.extend(after.filter_map(name));
            }
        }
    }
    names
}

/// The names of tests in a cell of a table.
fn named(cell: &str) -> impl Iterator<Item = String> {
    cell.split('`').filter(|word| word.contains('_')).map(str::to_owned)
}

/// The names of all tests of the crate.
fn tests_of_the_crate(root: &Path) -> BTreeSet<String> {
    ["src", "tests"].iter().flat_map(|dir| tests_below(&root.join(dir))).collect()
}

#[test]
fn every_clause_names_tests_that_are_there() {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    let suite = root.join("tests/conformance");
    let text = std::fs::read_to_string(suite.join("CLAUSES.md")).unwrap();
    let rows = text.lines().filter(|line| line.starts_with('|'));
    let named: BTreeSet<String> =
        rows.flat_map(|line| named(line.rsplit('|').nth(1).unwrap_or_default())).collect();
    let everywhere = tests_of_the_crate(&root);
    let lost: Vec<_> = named.difference(&everywhere).collect();
    assert!(lost.is_empty(), "CLAUSES.md names tests that are not there: {lost:?}");
    let own = tests_below(&suite);
    let unnamed: Vec<_> =
        own.difference(&named).filter(|name| !name.starts_with("every_")).collect();
    assert!(unnamed.is_empty(), "CLAUSES.md names no clause for {unnamed:?}");
}

#[test]
fn every_demand_of_the_document_has_a_test_that_is_there_or_a_reason() {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    let text = std::fs::read_to_string(root.join("tests/conformance/DEMANDS.md")).unwrap();
    let everywhere = tests_of_the_crate(&root);
    let (mut last, mut demands) = (("", 0), 0);
    for line in text.lines().filter(|line| line.starts_with("| ")).skip(1) {
        let cells: Vec<&str> = line.trim_matches('|').split('|').map(str::trim).collect();
        if cells[0] == "---" {
            continue;
        }
        let [section, number, binds, about, held] = cells[..] else { panic!("{line}") };
        let number: u32 = number.parse().unwrap();
        assert_eq!(number, if section == last.0 { last.1 + 1 } else { 1 }, "{line}");
        assert!(["server", "client", "both", "neither"].contains(&binds), "{line}");
        assert!(!about.is_empty(), "{line}");
        let tests: Vec<String> = named(held).collect();
        let has_reason = held.strip_prefix("– ").is_some_and(|why| why.len() > 5);
        assert_eq!(tests.is_empty() && held != "judge", has_reason, "{line}");
        let lost: Vec<_> = tests.iter().filter(|test| !everywhere.contains(*test)).collect();
        assert!(lost.is_empty(), "{section} {number} names tests that are not there: {lost:?}");
        (last, demands) = ((section, number), demands + 1);
    }
    assert_eq!(demands, 311, "sentences of the document");
}
