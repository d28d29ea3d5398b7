//! The program `qcow2` beside `qemu-img`: what both tell of an image as JSON, key by key. The images are those of the
//! corpus, as QEMU made them and as we changed them.

use std::path::PathBuf;

use block::BlockDevice;
use qcow2::OpenOptions;
use serde_json::{Value, json};

use crate::ours;
use crate::qemu::{Place, run};
use crate::qemu_images::{Made, make};
use crate::random::Random;
use crate::recipe::{Recipe, for_each};

/// The program, as `cargo build --workspace --bins` leaves it beside the tests.
fn program() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let beside = test.ancestors().nth(2).unwrap().join("qcow2");
    // Where coverage is measured, tests lie one folder deeper than what `cargo build` leaves.
    let above = test.ancestors().nth(4).unwrap().join("debug/qcow2");
    let path = [beside, above].into_iter().find(|path| path.exists());
    path.expect("qcow2 is not built: run `cargo build -p qcow2-program` first")
}

/// Notes where two documents differ.
fn differences(path: &str, ours: &Value, theirs: &Value, found: &mut Vec<String>) {
    match (ours, theirs) {
        (Value::Object(a), Value::Object(b)) => {
            let keys: std::collections::BTreeSet<_> = a.keys().chain(b.keys()).collect();
            for key in keys {
                let (a, b) =
                    (a.get(key).unwrap_or(&Value::Null), b.get(key).unwrap_or(&Value::Null));
                differences(&format!("{path}.{key}"), a, b, found);
            }
        }
        (Value::Array(a), Value::Array(b)) => {
            for (n, (a, b)) in a.iter().zip(b).enumerate() {
                differences(&format!("{path}[{n}]"), a, b, found);
            }
            if a.len() != b.len() {
                found.push(format!("{path}: {} members, qemu-img has {}", a.len(), b.len()));
            }
        }
        _ if ours == theirs => {}
        _ => found.push(format!("{path}: {ours}, qemu-img says {theirs}")),
    }
}

/// A map without what may differ. `qemu-img` also asks the file system for holes under clusters that are allocated,
/// which cuts them in pieces that are data and zero at once; and it lets a raw file end with its last sector, not with
/// its last byte, so that places that are kept for zeros behind that begin elsewhere.
fn comparable(recipe: &Recipe, map: &Value) -> Value {
    let keeps_places = recipe.extended && recipe.below.is_raw();
    let mut merged: Vec<Value> = Vec::new();
    for extent in map.as_array().unwrap() {
        let mut extent = extent.clone();
        if extent["data"] == true {
            extent["zero"] = false.into();
        } else if extent["depth"] != 0 && extent["length"].as_u64() < Some(512) {
            extent = json!({
                "start": extent["start"], "length": extent["length"], "depth": 0,
                "present": false, "zero": true, "data": false, "compressed": false,
            });
        }
        if keeps_places && extent["data"] == false {
            extent["offset"] = Value::Null;
        }
        let number = |extent: &Value, key: &str| extent[key].as_u64();
        if let Some(last) = merged.last_mut() {
            let len = number(last, "length").unwrap();
            let goes_on = number(last, "offset").map(|at| at + len) == number(&extent, "offset");
            let keys = ["depth", "present", "zero", "data", "compressed", "filename"];
            if goes_on && keys.iter().all(|key| last[key] == extent[key]) {
                last["length"] = (len + number(&extent, "length").unwrap()).into();
                continue;
            }
        }
        merged.push(extent);
    }
    merged.into()
}

/// Insists that both say the same.
fn assert_same(place: &Place, recipe: &Recipe, when: &str) {
    let program = program();
    let secret = format!("secret,id=key,data={}", crate::qemu::PASSPHRASE);
    let options = Place::options(recipe);
    let mut all = Vec::new();
    // Every opening by QEMU costs what a key does, and what is measured is not what is encrypted.
    for words in COMMANDS.into_iter().filter(|words| !(recipe.luks && words[0] == "measure")) {
        // Only an encrypted image needs more than its name.
        let command = words[0];
        let mut args = [words, &["--output=json"]].concat();
        match recipe.luks && command != "info" {
            true => args.extend(["--object", &secret, "--image-opts", &options]),
            false => args.extend(["-f", "qcow2", "disk.qcow2"]),
        }
        let [ours, theirs] = [program.to_str().unwrap(), "qemu-img"].map(|program| {
            let output = run(place.path(), program, &args);
            let json = serde_json::from_slice::<Value>(&output.stdout);
            let json = json.unwrap_or_else(|error| panic!("{}: {error}: {output:?}", place.what));
            (json, output.status.code())
        });
        let mut found = Vec::new();
        match command {
            "map" => {
                let [ours, theirs] = [&ours.0, &theirs.0].map(|map| comparable(recipe, map));
                differences("", &ours, &theirs, &mut found);
            }
            "measure" => {
                let (ours, mut theirs) = (ours.0.clone(), theirs.0.clone());
                // As with maps: holes of the file under clusters that are allocated are no data for `qemu-img`.
                if ours["required"].as_u64() >= theirs["required"].as_u64() {
                    theirs["required"] = ours["required"].clone();
                }
                differences("", &ours, &theirs, &mut found);
            }
            _ => differences("", &ours.0, &theirs.0, &mut found),
        }
        all.extend(found.into_iter().map(|difference| format!("{command} {difference}")));
        assert_eq!(ours.1, theirs.1, "{}, {when}: exit codes of {command}", place.what);
    }
    assert!(all.is_empty(), "{}, {when}: {all:#?}", place.what);
    if recipe.luks || !recipe.snapshots {
        // To list snapshots ours wants a passphrase.
        return;
    }
    let [ours, theirs] = [program.to_str().unwrap(), "qemu-img"].map(|program| {
        let output = run(place.path(), program, &["snapshot", "-l", "disk.qcow2"]);
        assert!(output.status.success(), "{}: {output:?}", place.what);
        String::from_utf8_lossy(&output.stdout).into_owned()
    });
    assert_eq!(ours, theirs, "{}, {when}: snapshot -l", place.what);
}

const COMMANDS: [&[&str]; 4] = [&["info"], &["check"], &["map"], &["measure", "-O", "qcow2"]];

/// Most images as QEMU made them or as we changed them, a quarter of them before and after that.
fn judge(recipe: &Recipe, seed: u64) {
    let Made { place, mut disk, .. } = make(recipe, seed);
    if seed % 4 < 2 {
        assert_same(&place, recipe, "as made");
    }
    if seed.is_multiple_of(4) {
        return;
    }
    ours::block_on(async {
        let image = ours::open(&place.image(), OpenOptions::writing()).await;
        ours::change(&image, recipe, &mut disk, &mut Random::new(seed), 15).await;
        image.close().await.unwrap();
    });
    assert_same(&place, recipe, "changed");
}

#[test]
fn of_small_clusters_both_programs_tell_the_same() {
    for_each(512..=32 << 10, judge);
}

#[test]
fn of_large_clusters_both_programs_tell_the_same() {
    for_each(64 << 10..=2 << 20, judge);
}
