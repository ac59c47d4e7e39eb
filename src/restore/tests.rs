//! Images with intact checksums and wrong contents.

use std::fs::File;
use std::path::{Path, PathBuf};

use proptest::prelude::*;

use super::{Origin, check};
use crate::image::{CONTEXT_FILE, MEMORY_FILE, Opened};
use crate::record::{Context, ObjectId};

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/images/v1-plain")
}

/// A copy of an image with `change` done to the payloads of its context, and checksums that are right for it.
fn changed(to: &Path, mut change: impl FnMut(usize, &mut Vec<u8>)) {
    let file = File::open(golden().join(CONTEXT_FILE)).unwrap();
    let good = Context::load(file).unwrap();
    let header = good.image_header().unwrap();
    let mut bad = Context::buffering_as(header).unwrap();
    let records = good.records().filter(|record| !record.kind().is_framing());
    for (number, record) in records.enumerate() {
        let mut payload = record.payload().to_vec();
        change(number, &mut payload);
        if record.id() != ObjectId::IMAGE {
            bad.adopt(record.id());
        }
        bad.append(record.kind(), record.id(), &[&payload]).unwrap();
    }
    bad.finish().unwrap();
    let mut file = File::create(to.join(CONTEXT_FILE)).unwrap();
    bad.write_out(&mut file).unwrap();
    std::fs::copy(golden().join(MEMORY_FILE), to.join(MEMORY_FILE)).unwrap();
}

#[test]
fn the_same_contents_are_the_same_image() {
    let place = tempfile::tempdir().unwrap();
    changed(place.path(), |_, _| {});
    let same = std::fs::read(place.path().join(CONTEXT_FILE)).unwrap();
    assert_eq!(same, std::fs::read(golden().join(CONTEXT_FILE)).unwrap());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Whatever stands there: an error or a container that can be tried, never a panic.
    #[test]
    fn wrong_contents_are_told(
        record in 0usize..200,
        changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        cut in proptest::option::weighted(0.2, any::<prop::sample::Index>()),
    ) {
        let place = tempfile::tempdir().unwrap();
        let mut count = 0;
        changed(place.path(), |_, _| count += 1);
        changed(place.path(), |number, payload| {
            if number == record % count && !payload.is_empty() {
                for (at, byte) in &changes {
                    let at = at.index(payload.len());
                    payload[at] = *byte;
                }
                if let Some(cut) = &cut {
                    payload.truncate(cut.index(payload.len()));
                }
            }
        });
        if let Ok(opened) = Opened::open(place.path()) {
            let _ = check(&Origin::new(opened));
        }
    }
}
