//! Reading images back: every kind of damage has its own error, and names the place.

use std::io::{self, Cursor, Read};
use std::process::Command;

use zerocopy::{FromBytes, IntoBytes};

use super::frame::{FrameHeader, Prologue, Trailer};
use super::*;

/// Offsets of the frames of an intact image.
pub(super) fn frames(image: &[u8]) -> Vec<usize> {
    let mut offsets = Vec::new();
    let mut offset = Prologue::LEN;
    while offset < image.len() {
        offsets.push(offset);
        offset += FrameHeader::LEN + frame::padded(header_at(image, offset).length as usize);
    }
    offsets
}

fn header_at(image: &[u8], offset: usize) -> FrameHeader {
    FrameHeader::read_from_bytes(&image[offset..offset + FrameHeader::LEN]).unwrap()
}

/// Changes the header of a frame and makes its checksum right again.
pub(super) fn forge(image: &mut [u8], offset: usize, change: impl FnOnce(&mut FrameHeader)) {
    let mut header = header_at(image, offset);
    let end = offset + FrameHeader::LEN + frame::padded(header.length as usize);
    change(&mut header);
    header.checksum = header.expected_checksum(&image[offset + FrameHeader::LEN..end]);
    image[offset..offset + FrameHeader::LEN].copy_from_slice(header.as_bytes());
}

/// Header, three pipes of 5, 0 and 16 bytes, trailer.
pub(super) fn sample() -> Vec<u8> {
    let mut context = Context::buffering_as(fixed_header()).unwrap();
    for content in [&b"first"[..], b"", b"sixteen bytes ok"] {
        let id = context.new_object();
        context.append(Kind::Pipe, id, &[content]).unwrap();
    }
    context.finish().unwrap();
    image_of(&mut context)
}

/// An image header that is the same every time.
pub(super) fn fixed_header() -> ImageHeader {
    ImageHeader {
        created_ns: 1,
        flags: 0,
        ..ImageHeader::here()
    }
}

pub(super) fn image_of(context: &mut Context) -> Vec<u8> {
    let mut image = Vec::new();
    context.write_out(&mut image).unwrap();
    image
}

fn load_error(image: &[u8]) -> Error {
    Context::load(image).expect_err("it must not be accepted")
}

#[test]
fn an_image_comes_back_as_it_was() {
    let image = sample();
    let mut context = Context::load(&image[..]).unwrap();
    let payloads: Vec<&[u8]> = context
        .records_of(Kind::Pipe)
        .map(|record| record.payload())
        .collect();
    assert_eq!(payloads, [&b"first"[..], b"", b"sixteen bytes ok"]);
    assert_eq!(context.image_header(), Some(fixed_header()));
    assert_eq!(context.failure(), None);
    assert_eq!(context.stats().bytes, image.len() as u64);
    assert!(matches!(
        context.append(Kind::Tree, ObjectId::IMAGE, &[]),
        Err(Error::Finished)
    ));
    assert_eq!(image_of(&mut context), image);
}

#[test]
fn long_records_and_many_chunks_come_back() {
    let mut context = Context::buffering().unwrap();
    for len in [
        CHUNK_LEN / 2,
        CHUNK_LEN / 2,
        1,
        CHUNK_LEN - 32,
        CHUNK_LEN,
        5 * CHUNK_LEN + 3,
        9,
    ] {
        let id = context.new_object();
        let content: Vec<u8> = (0..len).map(|at| (at % 251) as u8).collect();
        context.append(Kind::Memfd, id, &[&content]).unwrap();
    }
    context.finish().unwrap();
    let image = image_of(&mut context);
    let mut loaded = Context::load(&image[..]).unwrap();
    assert!(loaded.records().eq(context.records()));
    assert_eq!(image_of(&mut loaded), image);
}

#[test]
fn a_failed_checkpoint_says_why_in_its_image() {
    let mut context = Context::buffering().unwrap();
    context.fail("fd 7 of pid 12: io_uring").unwrap();
    let image = image_of(&mut context);
    let loaded = Context::load(&image[..]).unwrap();
    assert_eq!(
        loaded.failure().as_deref(),
        Some("fd 7 of pid 12: io_uring")
    );
    let kinds: Vec<Kind> = loaded.records().map(|record| record.kind()).collect();
    assert_eq!(kinds, [Kind::ImageHeader, Kind::Error, Kind::Trailer]);
}

#[test]
fn the_header_reads_alone() {
    let image = sample();
    let enough = frames(&image)[1];
    let header = read_header(&image[..enough]).unwrap();
    assert_eq!(header, fixed_header());
    assert_eq!(header.writer(), env!("CARGO_PKG_VERSION"));
    assert!(!header.kernel_release().is_empty());
    assert!(matches!(
        read_header(&image[..enough - 1]),
        Err(Error::Truncated { missing: 1, .. })
    ));
}

#[test]
fn what_is_no_image_is_called_so() {
    assert!(matches!(load_error(b""), Error::NotAnImage { .. }));
    assert!(matches!(
        load_error(b"PNG or whatever it is"),
        Error::NotAnImage { .. }
    ));
    assert!(matches!(load_error(&MAGIC[..7]), Error::NotAnImage { .. }));
}

#[test]
fn a_future_format_is_called_so() {
    let mut image = sample();
    image[8] = 2;
    assert!(matches!(
        load_error(&image),
        Error::FutureFormat {
            version: 2,
            known: 1
        }
    ));
}

#[test]
fn truncation_is_noticed_at_every_byte() {
    let image = sample();
    for len in MAGIC.len()..image.len() {
        let error = load_error(&image[..len]);
        assert!(matches!(error, Error::Truncated { .. }), "{len}: {error}");
    }
    let offsets = frames(&image);
    let Error::Truncated { at, missing } = load_error(&image[..offsets[3] + 40]) else {
        panic!()
    };
    assert_eq!(
        at,
        Position {
            record: 3,
            offset: offsets[3] as u64,
            kind: Some(Kind::Pipe)
        }
    );
    assert_eq!(missing, 8);
}

#[test]
fn a_flipped_bit_is_noticed_wherever_it_is() {
    let image = sample();
    for byte in 0..image.len() {
        for bit in 0..8 {
            let mut bad = image.clone();
            bad[byte] ^= 1 << bit;
            load_error(&bad);
        }
    }
    let mut bad = image.clone();
    let second = frames(&image)[1];
    bad[second + FrameHeader::LEN] ^= 1;
    let error = load_error(&bad);
    assert!(matches!(error, Error::Checksum { .. }));
    let text = error.to_string();
    assert!(
        text.starts_with(&format!(
            "record 1 (pipe) at byte {second}: corrupt: checksum"
        )),
        "{text}"
    );
}

#[test]
fn reordered_lost_and_repeated_records_are_noticed() {
    let image = sample();
    let at = frames(&image);
    let part = |from: usize, to: usize| image[at[from]..at[to]].to_vec();
    let lead = &image[..at[1]];
    let tail = &image[at[4]..];
    let swapped = [lead, &part(2, 3), &part(1, 2), &part(3, 4), tail].concat();
    assert!(matches!(load_error(&swapped), Error::Order { found: 2, at } if at.record == 1));
    let lost = [lead, &part(2, 3), &part(3, 4), tail].concat();
    assert!(matches!(load_error(&lost), Error::Order { found: 2, .. }));
    let repeated = [lead, &part(1, 2), &part(1, 2), &part(2, 4), tail].concat();
    assert!(matches!(load_error(&repeated), Error::Order { found: 1, at } if at.record == 2));
}

#[test]
fn a_record_of_another_image_is_noticed() {
    let image = sample();
    let mut other = sample();
    let second = frames(&image)[1];
    other[second + FrameHeader::LEN] = b'F';
    forge(&mut other, second, |_| {});
    let problem = load_error(&other).to_string();
    assert!(
        problem.ends_with("the trailer's checksum is not that of the records before it"),
        "{problem}"
    );
}

#[test]
fn unknown_kinds_and_future_versions_are_called_so() {
    let image = sample();
    let second = frames(&image)[1];
    let mut bad = image.clone();
    forge(&mut bad, second, |header| header.kind = 999);
    assert!(
        matches!(load_error(&bad), Error::UnknownKind { number: 999, at } if at.kind.is_none())
    );
    let mut bad = image.clone();
    forge(&mut bad, second, |header| header.version = 2);
    assert!(matches!(
        load_error(&bad),
        Error::FutureVersion {
            version: 2,
            known: 1,
            ..
        }
    ));
}

#[test]
fn rules_of_the_format_are_checked_behind_a_right_checksum() {
    type Damage = (&'static str, usize, fn(&mut FrameHeader));
    let cases: [Damage; 6] = [
        ("version 0 does not exist", 1, |header| header.version = 0),
        ("object id 0 does not exist", 1, |header| header.object = 0),
        (
            "the object has a record of this kind already",
            2,
            |header| header.object -= 1,
        ),
        (
            "the image header is the first record, and only that",
            0,
            |header| header.kind = 50,
        ),
        (
            "the image header is the first record, and only that",
            1,
            |header| header.kind = 1,
        ),
        (
            "a record of the image itself belongs to object 1",
            4,
            |header| header.object = 2,
        ),
    ];
    let image = sample();
    let at = frames(&image);
    for (problem, record, change) in cases {
        let mut bad = image.clone();
        forge(&mut bad, at[record], change);
        let error = load_error(&bad);
        assert!(
            matches!(error, Error::Malformed { problem: found, .. } if found == problem),
            "{problem}: {error}"
        );
    }
}

#[test]
fn padding_flags_and_trailer_are_checked() {
    let image = sample();
    let at = frames(&image);
    let with = |frame: usize, payload_offset: usize| {
        let mut bad = image.clone();
        bad[at[frame] + FrameHeader::LEN + payload_offset] ^= 1;
        forge(&mut bad, at[frame], |_| {});
        let Error::Malformed { problem, .. } = load_error(&bad) else {
            panic!("frame {frame}")
        };
        problem
    };
    assert_eq!(with(1, 5), "the padding is not zero");
    assert_eq!(
        with(0, 8),
        "the image header has flags that are not known here"
    );
    let counts = "the trailer counts other records or bytes than there are";
    assert_eq!(with(4, 0), counts);
    assert_eq!(with(4, 8), counts);
    assert_eq!(
        with(4, 16),
        "the trailer's checksum is not that of the records before it"
    );
    assert_eq!(
        with(4, 20),
        "the trailer's status does not agree with the error record"
    );
    assert_eq!(size_of::<Trailer>(), 24);
    let longer = [&image[..], b"\0"].concat();
    assert!(
        load_error(&longer)
            .to_string()
            .ends_with("there is something after the trailer")
    );
}

#[test]
fn a_length_is_not_believed_before_the_bytes_are_there() {
    let image = sample();
    let second = frames(&image)[1];
    let with_length = |length: u64| {
        let mut bad = image.clone();
        bad[second + 8..second + 16].copy_from_slice(&length.to_le_bytes());
        load_error(&bad)
    };
    assert!(matches!(
        with_length(u64::MAX),
        Error::AbsurdLength {
            length: u64::MAX,
            ..
        }
    ));
    assert!(matches!(
        with_length(MAX_PAYLOAD + 1),
        Error::AbsurdLength { .. }
    ));
    assert!(matches!(with_length(MAX_PAYLOAD), Error::Truncated { .. }));
}

#[test]
fn memory_follows_the_bytes_and_not_the_length() {
    // Peak memory is per process, so this test runs again in one of its own.
    const CHILD: &str = "SNAPBACK_TEST_PEAK_MEMORY";
    if std::env::var_os(CHILD).is_none() {
        let name = "record::decode_tests::memory_follows_the_bytes_and_not_the_length";
        let mut command = Command::new(std::env::current_exe().unwrap());
        let output = command
            .args(["--exact", name])
            .env(CHILD, "1")
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(
            output.status.success() && text.contains("1 passed"),
            "{text}"
        );
        return;
    }
    let mut image = sample();
    let second = frames(&image)[1];
    image[second + 8..second + 16].copy_from_slice(&MAX_PAYLOAD.to_le_bytes());
    let before = peak_memory();
    load_error(&image);
    assert!(peak_memory() < before + (8 << 20));
}

/// Peak resident memory in bytes.
fn peak_memory() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status
        .lines()
        .find(|line| line.starts_with("VmHWM:"))
        .unwrap();
    line.split_whitespace()
        .nth(1)
        .unwrap()
        .parse::<u64>()
        .unwrap()
        << 10
}

#[test]
fn a_failing_source_is_named_with_the_place() {
    struct Failing(Cursor<Vec<u8>>);
    impl Read for Failing {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            match self.0.read(buffer)? {
                0 => Err(io::Error::other("disk on fire")),
                count => Ok(count),
            }
        }
    }
    let mut image = sample();
    image.truncate(frames(&image)[2]);
    let error = Context::load(Failing(Cursor::new(image))).unwrap_err();
    assert!(matches!(&error, Error::Source { at, .. } if at.record == 2));
    assert!(error.to_string().contains("disk on fire"));
}
