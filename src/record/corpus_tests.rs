//! The committed corpus of the fuzz target.

use std::path::{Path, PathBuf};

use super::decode_tests::{fixed_header, forge, frames, image_of, sample};
use super::frame::FrameHeader;
use super::*;

fn corpus() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/corpus")
}

#[test]
fn the_committed_corpus_holds() {
    let mut inputs = 0;
    for entry in std::fs::read_dir(corpus()).expect("the corpus is part of the project") {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        let input = std::fs::read(&path).unwrap();
        fuzz_one(&input);
        // Names say what becomes of an input: `good-…`, or the error as in `Truncated-…`.
        let expected = name.split('-').next().unwrap();
        match Context::load(&input[..]) {
            Ok(_) => assert_eq!(expected, "good", "{name} was accepted"),
            Err(error) => assert!(
                format!("{error:?}").starts_with(expected),
                "{name}: {error:?}"
            ),
        }
        inputs += 1;
    }
    assert!(inputs >= 20, "only {inputs} inputs");
}

#[test]
#[ignore = "writes fixtures/corpus anew, after a change of the format"]
fn write_the_corpus() {
    std::fs::create_dir_all(corpus()).unwrap();
    let write = |name: &str, input: &[u8]| std::fs::write(corpus().join(name), input).unwrap();
    let image = sample();
    let at = frames(&image);
    let end = image.len();

    write("good-small", &image);
    let mut failed = Context::buffering_as(fixed_header()).unwrap();
    failed.fail("fd 7 of pid 12: io_uring").unwrap();
    write("good-failed-checkpoint", &image_of(&mut failed));
    let mut empty = Context::buffering_as(fixed_header()).unwrap();
    empty.finish().unwrap();
    write("good-empty", &image_of(&mut empty));
    let mut every = Context::buffering_as(fixed_header()).unwrap();
    let id = every.new_object();
    for kind in Kind::ALL.iter().copied().filter(|kind| !kind.is_framing()) {
        every.put_json(kind, id, &kind).unwrap();
    }
    every.finish().unwrap();
    write("good-every-kind", &image_of(&mut every));

    write("NotAnImage-nothing", b"");
    write("NotAnImage-text", b"#!/bin/sh\necho hello, world\n");
    write("NotAnImage-half-a-magic", &MAGIC[..4]);
    write(
        "FutureFormat-2",
        &[&image[..8], &2_u32.to_le_bytes(), &image[12..]].concat(),
    );
    write("Truncated-magic-only", &MAGIC);
    write("Truncated-in-header", &image[..at[1] + 7]);
    write("Truncated-in-payload", &image[..at[3] + 40]);
    write("Truncated-no-trailer", &image[..at[4]]);
    write(
        "Checksum-payload",
        &flipped(&image, at[1] + FrameHeader::LEN),
    );
    write("Checksum-object", &flipped(&image, at[1] + 16));
    write(
        "Order-swapped",
        &[
            &image[..at[1]],
            &image[at[2]..at[3]],
            &image[at[1]..at[2]],
            &image[at[3]..],
        ]
        .concat(),
    );
    write(
        "Order-repeated",
        &[&image[..at[2]], &image[at[1]..]].concat(),
    );
    write("Order-lost", &[&image[..at[1]], &image[at[2]..]].concat());
    let with_length = |length: u64| {
        [
            &image[..at[1] + 8],
            &length.to_le_bytes(),
            &image[at[1] + 16..],
        ]
        .concat()
    };
    write("AbsurdLength-max", &with_length(u64::MAX));
    write("AbsurdLength-one-too-long", &with_length(MAX_PAYLOAD + 1));
    write("Truncated-promises-64-GiB", &with_length(MAX_PAYLOAD));
    let forged = |record: usize, change: fn(&mut FrameHeader)| {
        let mut bad = image.clone();
        forge(&mut bad, at[record], change);
        bad
    };
    write("UnknownKind-999", &forged(1, |header| header.kind = 999));
    write("FutureVersion-2", &forged(1, |header| header.version = 2));
    write(
        "Malformed-version-0",
        &forged(1, |header| header.version = 0),
    );
    write("Malformed-object-0", &forged(1, |header| header.object = 0));
    write("Malformed-twice", &forged(2, |header| header.object -= 1));
    write(
        "Malformed-second-image-header",
        &forged(1, |header| header.kind = 1),
    );
    write(
        "Malformed-no-image-header",
        &forged(0, |header| header.kind = 50),
    );
    let mut padding = image.clone();
    padding[at[1] + FrameHeader::LEN + 5] = 1;
    forge(&mut padding, at[1], |_| {});
    write("Malformed-padding", &padding);
    let mut trailer = image.clone();
    trailer[at[4] + FrameHeader::LEN] ^= 1;
    forge(&mut trailer, at[4], |_| {});
    write("Malformed-trailer-count", &trailer);
    write(
        "Malformed-after-the-trailer",
        &[&image[..end], b"more"].concat(),
    );
    let reserved = [&image[..12], &[1, 0, 0, 0], &image[16..]].concat();
    write("Malformed-prologue", &reserved);
}

fn flipped(image: &[u8], byte: usize) -> Vec<u8> {
    let mut bad = image.to_vec();
    bad[byte] ^= 1;
    bad
}
