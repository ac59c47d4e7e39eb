//! What holds for every input, the memory of an image or not.

use super::pages::Store;
use super::reading::StoredPages;
use super::space::StoredSpace;
use crate::kernel::memory_file::memory_file;
use crate::memory::{PAGE, Span};
use crate::record::{Frames, Kind, ObjectId, with_right_checksums};

/// What the fuzz target calls with each input: whatever is accepted can be read, and whatever is not gives an error that can be
/// shown. The input is tried as it is, and once more with all checksums made right.
///
/// # Panics
///
/// If that does not hold.
pub fn fuzz_one(input: &[u8]) {
    check(input);
    check(&with_right_checksums(input));
}

fn check(input: &[u8]) {
    let file = || memory_file(c"snapback-fuzz", input).expect("there is memory");
    let (damaged, problem) = Frames::open_damaged(file());
    let whole = Frames::open(file());
    assert_eq!(whole.is_ok(), problem.is_none(), "both find the same");
    for error in whole.as_ref().err().into_iter().chain(&problem) {
        assert!(!error.to_string().is_empty(), "every error has a message");
    }
    for frames in whole.into_iter().chain(damaged) {
        for frame in frames.frames() {
            let _ = frames.payload(frame);
        }
        let _ = StoredSpace::read(&frames, "fuzz".as_ref(), ObjectId::IMAGE);
        let indexes = frames.frames().iter();
        let indexes = indexes.filter(|frame| frame.kind() == Kind::PageIndex);
        let objects: Vec<ObjectId> = indexes.map(crate::record::Frame::id).collect();
        let Ok(store) = Store::new(frames, "fuzz".into()) else {
            continue;
        };
        let store = std::sync::Arc::new(store);
        let problems = store.problems().count();
        let mut page = [0; PAGE as usize];
        for id in objects {
            for run in store.index(id).unwrap_or_default() {
                let span = Span {
                    start: run.address,
                    end: run.address + PAGE,
                };
                let read = StoredPages::new(store.clone(), id).read(&[span], &mut page);
                assert!(
                    read.is_ok() || problems > 0,
                    "{:?} and no problem",
                    read.err()
                );
            }
        }
    }
}
