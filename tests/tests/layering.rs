//! Asserts from the manifests that dependencies between our crates go one way, and that the libraries stay small to
//! embed. What each crate does with a dependency is for review.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;

/// Which of our crates a crate may depend on. `nbd-server` may use `qcow2` in its program only.
const ALLOWED: &[(&str, &[&str])] = &[
    ("block", &[]),
    ("qcow2", &["block"]),
    ("nbd-server", &["block"]),
    // The program alone: the library knows no protocol, and the client no format.
    ("qcow2/program", &["block", "nbd-server", "qcow2"]),
    ("chain", &["block", "qcow2"]),
    ("agent", &["block", "nbd-server"]),
    ("hub", &["agent", "block", "chain", "nbd-server", "qcow2"]),
];

/// The libraries that other projects embed, with the feature flags an embedder would use.
const SMALL: &[(&str, &[&str])] = &[
    ("block", &[]),
    ("qcow2", &[]),
    ("chain", &[]),
    ("nbd-server", &["--no-default-features", "--features", "client"]),
];

/// The most crates that an embedder of a small library compiles, the library itself included.
const MOST_CRATES: usize = 40;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace is above")
}

fn manifest(krate: &str) -> toml::Table {
    let path = root().join(krate).join("Cargo.toml");
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    text.parse().unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// Every dependency of a manifest by the name of its package, in any table and for any target, with whether it is
/// optional.
fn dependencies(table: &toml::Table) -> BTreeMap<String, bool> {
    let mut found = BTreeMap::new();
    for (key, value) in table {
        let Some(inner) = value.as_table() else { continue };
        match key.as_str() {
            "dependencies" | "dev-dependencies" | "build-dependencies" => {
                for (name, spec) in inner {
                    let name = spec.get("package").and_then(toml::Value::as_str).unwrap_or(name);
                    let optional =
                        spec.get("optional").and_then(toml::Value::as_bool).unwrap_or(false);
                    found.insert(name.to_owned(), optional);
                }
            }
            "target" => {
                for platform in inner.values().filter_map(toml::Value::as_table) {
                    found.extend(dependencies(platform));
                }
            }
            _ => {}
        }
    }
    found
}

#[test]
fn arrows_between_our_crates_go_one_way() {
    let ours: BTreeSet<&str> = ALLOWED.iter().map(|(name, _)| *name).collect();
    for (krate, allowed) in ALLOWED {
        for (dependency, optional) in dependencies(&manifest(krate)) {
            let for_its_program = *krate == "nbd-server" && dependency == "qcow2" && optional;
            assert!(
                !ours.contains(dependency.as_str())
                    || allowed.contains(&dependency.as_str())
                    || for_its_program,
                "{krate} must not depend on {dependency}"
            );
        }
    }
}

#[test]
fn every_crate_has_its_place() {
    let workspace = manifest(".");
    let members = workspace["workspace"]["members"].as_array().expect("a list of members");
    let mut members: BTreeSet<&str> = members.iter().filter_map(toml::Value::as_str).collect();
    // What measures and what tests may use everything.
    assert!(members.remove("tests") && members.remove("benches"));
    assert_eq!(members, ALLOWED.iter().map(|(name, _)| *name).collect());
}

#[test]
fn only_the_program_of_nbd_server_pulls_in_qcow2() {
    let manifest = manifest("nbd-server");
    let features = manifest["features"].as_table().expect("a features table");
    for (feature, enables) in features {
        let pulls = enables.as_array().is_some_and(|list| {
            list.iter().any(|item| item.as_str().is_some_and(|item| item.contains("qcow2")))
        });
        assert!(!pulls || feature == "program", "feature {feature} pulls in qcow2");
    }
    let bins = manifest["bin"].as_array().expect("a bin table");
    assert!(bins.iter().all(|bin| {
        bin["required-features"]
            .as_array()
            .is_some_and(|list| list.iter().any(|item| item.as_str() == Some("program")))
    }));
}

#[test]
fn the_libraries_stay_small_to_embed() {
    for (krate, flags) in SMALL {
        let output = Command::new(env!("CARGO"))
            .current_dir(root())
            .args(["tree", "--offline", "--edges", "normal", "--prefix", "none", "--no-dedupe"])
            .args(["--package", krate])
            .args(*flags)
            .output()
            .expect("cargo runs");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let crates: BTreeSet<&str> =
            text.lines().filter_map(|line| line.split_whitespace().next()).collect();
        assert!(crates.contains(krate), "no tree for {krate}: {text}");
        assert!(crates.len() < MOST_CRATES, "{krate} needs {} crates: {crates:?}", crates.len());
        for heavy in ["axum", "rusqlite", "rustls", "reqwest"] {
            assert!(!crates.contains(heavy), "{krate} pulls in {heavy}");
        }
    }
}

#[test]
fn unsafe_code_lives_in_block_alone() {
    for (krate, _) in ALLOWED.iter().filter(|(krate, _)| *krate != "block") {
        let mut folders = vec![root().join(krate)];
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(&folder).expect("a readable folder").flatten() {
                let path = entry.path();
                if path.is_dir() {
                    folders.push(path);
                } else if path.extension().is_some_and(|extension| extension == "rs") {
                    let text = std::fs::read_to_string(&path).expect("readable source");
                    let uses = text.lines().any(|line| {
                        let code = line.split("//").next().unwrap_or_default();
                        code.contains("unsafe {")
                            || code.contains("unsafe fn")
                            || code.contains("unsafe impl")
                    });
                    assert!(!uses, "unsafe code in {}", path.display());
                }
            }
        }
    }
}
