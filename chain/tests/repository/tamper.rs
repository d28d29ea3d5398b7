//! Sealed layers that somebody changed, moved or replaced: found before anything is put on them, and named.

use std::os::unix::fs::FileExt;

use chain::{Error, LayerKind, LayerRef, LayerRule, ManifestRule, ParentLink};

use crate::support::{Bench, noise, qemu_img, request, text};

/// What is said when an incremental is to be put on the newest layer, and when that is to be read.
async fn refusals(bench: &Bench, top: &LayerRef) -> [Error; 2] {
    let plan = bench.child_of(top);
    let create = bench.repository.create_layer(&plan).await.err().expect("creating is refused");
    assert!(!bench.temp.path().join(&plan.path).exists(), "nothing was created");
    let open = bench.repository.open_point(&top.path).await.err().expect("opening is refused");
    [create, open]
}

/// Both refusals are `expected` and name the file of `layer`.
async fn refused(bench: &Bench, top: &LayerRef, layer: &LayerRef, expected: &LayerRule) {
    for error in refusals(bench, top).await {
        let Error::Layer { file, rule } = &error else { panic!("{error}") };
        assert_eq!(rule, expected, "{error}");
        assert_eq!(file.file_name().unwrap(), layer.path.file_name(), "{error}");
    }
}

fn flip(bench: &Bench, layer: &LayerRef, at: u64) {
    let file = std::fs::File::options().read(true).write(true).open(bench.file(layer)).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 4], at).unwrap();
}

fn len(bench: &Bench, layer: &LayerRef) -> u64 {
    std::fs::metadata(bench.file(layer)).unwrap().len()
}

#[tokio::test]
async fn a_layer_that_is_missing_or_was_renamed_is_found_wherever_it_lies_in_the_chain() {
    for lost in 0..3 {
        let bench = Bench::new().await;
        let layers = bench.chain(2).await;
        let file = bench.file(&layers[lost]);
        std::fs::rename(&file, file.with_extension("away")).unwrap();
        refused(&bench, &layers[2], &layers[lost], &LayerRule::Missing).await;
        let states = bench.states().await;
        assert_eq!(states.iter().filter(|state| **state == "broken").count(), 3 - lost);
    }
}

#[tokio::test]
async fn a_layer_that_was_truncated_or_extended_is_found() {
    for (layer, change) in [(0, -512), (1, -1), (2, 1), (1, 65536)] {
        let bench = Bench::new().await;
        let layers = bench.chain(2).await;
        let recorded = len(&bench, &layers[layer]);
        let found = recorded.checked_add_signed(change).unwrap();
        let file = std::fs::File::options().write(true).open(bench.file(&layers[layer])).unwrap();
        file.set_len(found).unwrap();
        let rule = LayerRule::Length { recorded, found };
        refused(&bench, &layers[2], &layers[layer], &rule).await;
    }
}

#[tokio::test]
async fn a_flipped_bit_in_a_header_is_found() {
    let bench = Bench::new().await;
    let layers = bench.chain(2).await;
    for layer in &layers {
        flip(&bench, layer, 30);
        refused(&bench, &layers[2], layer, &LayerRule::Content { part: "header" }).await;
        flip(&bench, layer, 30);
    }
    bench.repository.open_point(&layers[2].path).await.unwrap();
}

#[tokio::test]
async fn a_file_of_the_same_size_and_layout_in_place_of_a_layer_is_found() {
    let bench = Bench::new().await;
    let layers = bench.chain(1).await;
    let other = Bench::new().await;
    let stranger = other.sealed(&request(0, None), &[(0, noise(99, 1 << 20))]).await;
    assert_eq!(len(&bench, &layers[0]), len(&other, &stranger), "the sizes are the same");
    std::fs::copy(other.file(&stranger), bench.file(&layers[0])).unwrap();
    for error in refusals(&bench, &layers[1]).await {
        assert!(matches!(&error, Error::Layer { rule: LayerRule::Content { .. }, .. }), "{error}");
    }
}

#[tokio::test]
async fn another_sealed_layer_in_place_of_a_parent_is_found() {
    let bench = Bench::new().await;
    let layers = bench.chain(1).await;
    let other = Bench::new().await;
    let stranger = other.sealed(&request(0, None), &[(0, noise(99, 1 << 20))]).await;
    std::fs::copy(other.file(&stranger), bench.file(&layers[0])).unwrap();
    std::fs::copy(other.manifest_file(&stranger), bench.manifest_file(&layers[0])).unwrap();
    let rule = LayerRule::ParentIdentity {
        parent: layers[0].path.file_name().to_owned(),
        recorded: layers[0].layer_uuid,
        found: stranger.layer_uuid,
    };
    refused(&bench, &layers[1], &layers[1], &rule).await;
    assert_eq!(bench.states().await, ["sealed", "broken"]);

    let plan = bench.child_of(&layers[0]);
    let error = bench.repository.create_layer(&plan).await.err().unwrap();
    let rule = LayerRule::Identity { recorded: layers[0].layer_uuid, found: stranger.layer_uuid };
    assert!(matches!(&error, Error::Layer { rule: found, .. } if *found == rule), "{error}");
}

#[tokio::test]
async fn a_flipped_bit_in_a_manifest_is_found() {
    let bench = Bench::new().await;
    let layers = bench.chain(1).await;
    let file = bench.manifest_file(&layers[0]);
    let whole = std::fs::read(&file).unwrap();
    for at in (0..whole.len()).step_by(97) {
        let mut bytes = whole.clone();
        bytes[at] ^= 1;
        std::fs::write(&file, bytes).unwrap();
        for error in refusals(&bench, &layers[1]).await {
            let Error::Manifest { file: named, .. } = &error else { panic!("byte {at}: {error}") };
            assert_eq!(named.file_name(), file.file_name(), "{error}");
        }
        assert_eq!(bench.states().await, ["broken", "broken"], "byte {at}");
    }
}

#[tokio::test]
async fn a_manifest_beside_another_layer_is_found() {
    let bench = Bench::new().await;
    let layers = bench.chain(1).await;
    std::fs::copy(bench.manifest_file(&layers[0]), bench.manifest_file(&layers[1])).unwrap();
    for error in refusals(&bench, &layers[1]).await {
        assert!(
            matches!(&error, Error::Manifest { rule: ManifestRule::OtherFile { .. }, .. }),
            "{error}"
        );
    }
}

#[tokio::test]
async fn a_parent_whose_manifest_is_gone_is_no_parent() {
    let bench = Bench::new().await;
    let layers = bench.chain(2).await;
    std::fs::remove_file(bench.manifest_file(&layers[1])).unwrap();
    for error in refusals(&bench, &layers[2]).await {
        let Error::NotSealed { file } = &error else { panic!("{error}") };
        assert_eq!(file.file_name().unwrap(), layers[1].path.file_name());
    }
    assert_eq!(bench.states().await, ["sealed", "broken", "broken"]);
}

#[tokio::test]
async fn a_parent_that_disappears_while_a_layer_is_written_keeps_it_from_being_sealed() {
    let bench = Bench::new().await;
    let full = bench.sealed(&request(0, None), &[(0, noise(1, 1 << 20))]).await;
    let child = bench.written(&request(1, Some(&full)), &[(0, noise(2, 4096))]).await;
    std::fs::remove_file(bench.manifest_file(&full)).unwrap();
    let error = bench.repository.seal_layer(child, crate::support::facts(1)).await.unwrap_err();
    assert!(matches!(error, Error::NotSealed { .. }), "{error}");
    assert_eq!(bench.states().await, ["unsealed", "unsealed"]);
}

#[tokio::test]
async fn a_layer_reached_through_a_link_is_refused() {
    let bench = Bench::new().await;
    let layers = bench.chain(1).await;
    let file = bench.file(&layers[0]);
    let away = bench.temp.path().join("away");
    std::fs::rename(&file, &away).unwrap();
    std::os::unix::fs::symlink(&away, &file).unwrap();
    refused(&bench, &layers[1], &layers[0], &LayerRule::NotAFile).await;
}

#[tokio::test]
async fn layers_that_stand_on_each_other_in_a_circle_are_refused() {
    let bench = Bench::new().await;
    let layers = bench.chain(1).await;
    let mut bottom = bench.repository.manifest(&layers[0].path).await.unwrap();
    bottom.kind = LayerKind::Incremental;
    bottom.sequence = 7;
    bottom.parent = Some(ParentLink {
        file: layers[1].path.file_name().to_owned(),
        layer_uuid: layers[1].layer_uuid,
    });
    std::fs::write(bench.manifest_file(&layers[0]), bottom.to_bytes().unwrap()).unwrap();
    let rule = LayerRule::ParentMismatch {
        parent: layers[0].path.file_name().to_owned(),
        what: "does not come before it",
    };
    refused(&bench, &layers[1], &layers[1], &rule).await;
    assert_eq!(bench.states().await, ["broken", "broken"]);
}

#[tokio::test]
async fn an_image_that_was_put_on_another_file_is_refused() {
    let bench = Bench::new().await;
    let layers = bench.chain(2).await;
    // Rebasing rewrites the header, which the fingerprint shows; so the manifest is made to fit again.
    let top = bench.file(&layers[2]);
    let base = layers[0].path.file_name();
    qemu_img(&["rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", base, text(&top)]);
    let header = LayerRule::Content { part: "header" };
    refused(&bench, &layers[2], &layers[2], &header).await;
    let mut manifest = bench.repository.manifest(&layers[2].path).await.unwrap();
    let bytes = std::fs::read(&top).unwrap();
    let head = usize::try_from(manifest.fingerprint.head_bytes).unwrap();
    manifest.fingerprint.head_crc32 = crc32fast::hash(&bytes[..head]);
    std::fs::write(bench.manifest_file(&layers[2]), manifest.to_bytes().unwrap()).unwrap();
    let rule = LayerRule::Backing {
        recorded: Some(layers[1].path.file_name().to_owned()),
        found: Some(base.to_owned()),
    };
    refused(&bench, &layers[2], &layers[2], &rule).await;
}
