//! Keeps `CLAUSES.md` true: every test that it names is there, and every test of this suite is named in it.

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
                let after = text.split("test]\n").skip(1);
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

#[test]
fn every_clause_names_tests_that_are_there() {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    let suite = root.join("tests/conformance");
    let text = std::fs::read_to_string(suite.join("CLAUSES.md")).unwrap();
    let named: BTreeSet<String> = text
        .lines()
        .filter(|line| line.starts_with('|'))
        .flat_map(|line| line.rsplit('|').nth(1).unwrap_or_default().split('`'))
        .filter(|word| word.contains('_'))
        .map(str::to_owned)
        .collect();
    let everywhere: BTreeSet<String> =
        ["src", "tests"].iter().flat_map(|dir| tests_below(&root.join(dir))).collect();
    let lost: Vec<_> = named.difference(&everywhere).collect();
    assert!(lost.is_empty(), "CLAUSES.md names tests that are not there: {lost:?}");
    let own = tests_below(&suite);
    let unnamed: Vec<_> =
        own.difference(&named).filter(|name| !name.contains("every_clause")).collect();
    assert!(unnamed.is_empty(), "CLAUSES.md names no clause for {unnamed:?}");
}
