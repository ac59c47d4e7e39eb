//! Images of every version keep reading; damaged ones give an error that says where, and are shown as far as they go.

use std::fs;
use std::path::{Path, PathBuf};

use super::*;
use crate::record::{Frames, Kind, with_right_checksums};

/// The committed images.
fn golden() -> Vec<PathBuf> {
    let images = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/images");
    let entries = fs::read_dir(images).expect("they are part of the project");
    let mut paths: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths
}

/// A copy of one, to be damaged.
struct Copy {
    directory: tempfile::TempDir,
    files: [(&'static str, Vec<u8>); 2],
}

impl Copy {
    fn of(image: &Path) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let files = [CONTEXT_FILE, MEMORY_FILE].map(|name| {
            let bytes = fs::read(image.join(name)).unwrap();
            fs::write(directory.path().join(name), &bytes).unwrap();
            (name, bytes)
        });
        Self { directory, files }
    }

    fn path(&self) -> &Path {
        self.directory.path()
    }

    /// Where the records of a file begin.
    fn offsets(&self, name: &str) -> Vec<usize> {
        let frames = Frames::open(fs::File::open(self.path().join(name)).unwrap()).unwrap();
        let frames = frames.frames().iter();
        frames
            .map(|frame| frame.position().offset as usize)
            .collect()
    }

    /// What becomes of it with other bytes in the place of a file: the error. It must be said of where it is, what can be
    /// shown must be shown, and no more memory be taken than there are bytes.
    fn with(&self, name: &str, bytes: &[u8]) -> Option<String> {
        fs::write(self.path().join(name), bytes).unwrap();
        let opened = Opened::open(self.path()).and_then(|opened| opened.verify());
        let inspection = Inspection::of_directory(self.path());
        let problem = opened.err().map(|error| error.to_string());
        assert_eq!(
            problem.is_none(),
            inspection.problems.is_empty(),
            "{problem:?}, {:?}",
            inspection.problems
        );
        if let Some(problem) = &problem {
            let file = self.path().display().to_string();
            assert!(problem.starts_with(&file), "{problem}");
        }
        problem
    }

    fn undo(&self) {
        for (name, bytes) in &self.files {
            fs::write(self.path().join(name), bytes).unwrap();
        }
    }
}

#[test]
fn images_of_every_version_keep_reading() {
    let images = golden();
    assert!(images.len() >= 2);
    for image in images {
        let opened = Opened::open(&image).unwrap();
        opened.verify().unwrap();
        assert_eq!(opened.info.name, "golden");
        assert_eq!(opened.info.processes, 1);
        assert_eq!(opened.spaces.len(), 1);
        let space = opened.spaces.values().next().unwrap();
        assert_eq!(space.program.path, Path::new("/usr/bin/sleep"));
        let inspection = Inspection::of_directory(&image);
        assert_eq!(inspection.problems, [""; 0]);
        assert_eq!(inspection.processes[0].name, "sleep");
        assert_eq!(inspection.descriptors.len(), 3);
        assert_eq!(
            inspection.spaces[0].populated_bytes,
            opened.info.resident_pages * 4096
        );
    }
}

/// The stack holds what the program was started with: the contents are the right ones at the right addresses.
#[test]
fn pages_of_committed_images_are_the_programs() {
    for image in golden() {
        let opened = Opened::open(&image).unwrap();
        let (id, space) = opened.spaces.iter().next().unwrap();
        let [arguments, end] = [space.bounds[6], space.bounds[7]];
        let page = arguments / 4096 * 4096;
        let span = crate::memory::Span {
            start: page,
            end: page + 8192,
        };
        let mut bytes = vec![0; 8192];
        opened.read(*id, &[span], &mut bytes).unwrap();
        let text = &bytes[(arguments - page) as usize..(end - page) as usize];
        assert_eq!(text, b"sleep\x001000\0");
    }
}

#[test]
fn cut_anywhere() {
    for image in golden() {
        let copy = Copy::of(&image);
        for (name, bytes) in &copy.files {
            let ends = copy.offsets(name);
            let ends = ends.iter().flat_map(|at| [at - 1, *at, at + 16, at + 33]);
            for end in ends.chain([0, 7, bytes.len() - 1]) {
                let problem = copy.with(name, &bytes[..end]).unwrap();
                let is_told = ["truncated", "not a snapback image"];
                assert!(
                    is_told.iter().any(|what| problem.contains(what)),
                    "{end}: {problem}"
                );
            }
            copy.undo();
        }
    }
}

#[test]
fn any_bit_flipped() {
    let copy = Copy::of(&golden()[1]);
    for (name, bytes) in &copy.files {
        let headers = copy.offsets(name);
        let headers = headers.iter().flat_map(|at| *at..at + 32);
        let others = (0..bytes.len()).step_by(509);
        for at in (0..16).chain(headers).chain(others) {
            let mut damaged = bytes.clone();
            damaged[at] ^= 1 << (at % 8);
            let problem = copy.with(name, &damaged);
            assert!(problem.is_some(), "byte {at} of {name}");
        }
        copy.undo();
    }
}

#[test]
fn records_swapped_lost_or_repeated() {
    let copy = Copy::of(&golden()[1]);
    for (name, bytes) in &copy.files {
        let mut at = copy.offsets(name);
        at.push(bytes.len());
        let record = |number: usize| &bytes[at[number]..at[number + 1]];
        for number in 1..at.len() - 2 {
            let [before, after] = [&bytes[..at[number]], &bytes[at[number + 1]..]];
            let lost = [before, after].concat();
            let twice = [before, record(number), record(number), after].concat();
            let rest = &bytes[at[number + 2].min(bytes.len())..];
            let swapped = [before, record(number + 1), record(number), rest].concat();
            for damaged in [lost, twice, swapped] {
                for damaged in [with_right_checksums(&damaged), damaged] {
                    let problem = copy.with(name, &damaged);
                    assert!(problem.is_some(), "record {number} of {name}");
                }
            }
        }
        copy.undo();
    }
}

/// Checksums are right, what is said is not.
#[test]
fn lengths_counts_and_ids_that_lie() {
    let copy = Copy::of(&golden()[0]);
    let (name, bytes) = &copy.files[1];
    let path = copy.path().join(name);
    let frames = Frames::open(fs::File::open(&path).unwrap()).unwrap();
    let place = |kind: Kind| {
        let mut frames = frames.frames().iter();
        let frame = frames.find(|frame| frame.kind() == kind).unwrap();
        frame.position().offset as usize
    };
    let lie = |at: usize, value: u64, len: usize| {
        let mut damaged = bytes.clone();
        damaged[at..at + len].copy_from_slice(&value.to_le_bytes()[..len]);
        let problem = copy.with(name, &with_right_checksums(&damaged));
        problem.unwrap_or_else(|| panic!("{value} at {at} was accepted"))
    };
    let (pages, index) = (place(Kind::Pages), place(Kind::PageIndex));
    for length in [1 << 36, (1 << 36) + 1, u64::MAX, 1 << 30, 0, 8] {
        lie(pages + 8, length, 8);
        lie(index + 8, length, 8);
    }
    // Encoding and number of pages of a record.
    assert!(lie(pages + 32, 7, 4).contains("encoding 7"));
    for count in [0, 1, 257, u64::from(u32::MAX)] {
        assert!(lie(pages + 36, count, 4).contains("record "), "{count}");
    }
    // Of the first run: address, record, first page, pages.
    let run = index + 32;
    assert!(lie(run, 0xffff_ffff_ffff_f000, 8).contains("page index"));
    assert!(lie(run, 123, 8).contains("not in order"));
    for record in [0, 1, 1_000_000_000, u64::MAX] {
        assert!(
            lie(run + 8, record, 8).contains("holds no pages"),
            "{record}"
        );
    }
    assert!(lie(run + 16, 250, 4).contains("fewer pages"));
    assert!(lie(run + 16, u64::from(u32::MAX), 4).contains("longer than a record"));
    assert!(lie(run + 20, 1_000_000_000, 4).contains("longer than a record"));
    assert!(lie(run + 20, 0, 4).contains("empty"));
    // Whose they are.
    for (kind, at) in [
        (Kind::PageIndex, index),
        (Kind::Program, place(Kind::Program)),
    ] {
        assert!(lie(at + 16, 999, 8).contains("there is no"), "{kind}");
    }
}

/// What unpacks to more than it says takes no more memory than it says.
#[test]
fn contents_that_unpack_to_more() {
    let bomb = zstd::bulk::compress(&vec![0; 64 << 20], 1).unwrap();
    let header = PagesHeader {
        encoding: Encoding::Zstd as u32,
        pages: 1,
    };
    let mut decoded = super::pages::Decoded::default();
    decoded
        .payload
        .extend(zerocopy::IntoBytes::as_bytes(&header));
    decoded.payload.extend(bomb);
    let problem = super::pages::unpack(&mut decoded).unwrap_err();
    assert!(problem.contains("can't be unpacked"), "{problem}");
}

#[test]
fn files_of_two_images_don_t_go_together() {
    let images = golden();
    let copy = Copy::of(&images[0]);
    let other = fs::read(images[1].join(MEMORY_FILE)).unwrap();
    // Both were written from one checkpoint, so they do.
    assert_eq!(copy.with(MEMORY_FILE, &other), None);
    let mut later = other;
    later[48] ^= 1;
    let problem = copy.with(MEMORY_FILE, &with_right_checksums(&later));
    assert!(problem.unwrap().contains("does not belong"));
}

#[test]
fn what_is_no_image() {
    let directory = tempfile::tempdir().unwrap();
    assert!(Opened::open(directory.path()).is_err());
    assert_eq!(Inspection::of_directory(directory.path()).problems.len(), 2);
    let copy = Copy::of(&golden()[0]);
    let path = copy.path().join(MEMORY_FILE);
    fs::remove_file(&path).unwrap();
    std::os::unix::fs::symlink("/etc/passwd", &path).unwrap();
    assert!(Opened::open(copy.path()).is_err());
    fs::remove_file(&path).unwrap();
    fs::create_dir(&path).unwrap();
    let error = Opened::open(copy.path()).unwrap_err();
    assert!(error.to_string().contains("not a plain file"), "{error}");
}

#[test]
fn the_entry_of_the_fuzz_target_holds_for_what_is_committed() {
    for image in golden() {
        let bytes = fs::read(image.join(MEMORY_FILE)).unwrap();
        fuzz_one(&bytes);
        for at in (0..bytes.len()).step_by(97) {
            let mut damaged = bytes.clone();
            damaged[at] ^= 0x11;
            fuzz_one(&damaged);
        }
    }
}
