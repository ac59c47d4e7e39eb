//! What holds for every input, image or not.

use zerocopy::{FromBytes, IntoBytes};

use super::frame::{Digest, FrameHeader, Prologue, Trailer, padded};
use super::{Context, Kind, read_header};

/// What the fuzz target calls with each input, and the test suite with the committed corpus: whatever is accepted as
/// an image is written out again byte for byte, and whatever is not gives an error that can be shown.
///
/// The input is tried as it is, and once more with all checksums made right, so that chance gets past them.
///
/// # Panics
///
/// If that does not hold.
pub fn fuzz_one(input: &[u8]) {
    check(input);
    check(&with_right_checksums(input));
}

fn check(input: &[u8]) {
    let header = read_header(input);
    match Context::load(input) {
        Ok(context) => {
            let within = context.image_header();
            assert_eq!(
                within,
                header.ok(),
                "the header reads alone as it reads within the image"
            );
            let mut again = Vec::with_capacity(input.len());
            context
                .write_out(&mut again)
                .expect("a loaded image is whole");
            assert_eq!(
                again, input,
                "an accepted image is written out as it was read"
            );
            assert_eq!(
                context.stats().bytes,
                input.len() as u64,
                "statistics count every byte"
            );
            for record in context.records() {
                let found = context.find(record.kind(), record.id());
                assert!(
                    found == Some(record) || record.kind().is_repeated(),
                    "every record is found by kind and object"
                );
                let _ = (record.fixed::<[u64; 2]>(), record.list::<u32>());
                let _ = record.json::<serde_json::Value>();
            }
        }
        Err(error) => assert!(!error.to_string().is_empty(), "every error has a message"),
    }
}

/// The input with the checksums of all its frames and the digest of its trailers as they should be.
pub(crate) fn with_right_checksums(input: &[u8]) -> Vec<u8> {
    let mut image = input.to_vec();
    let mut digest = Digest::default();
    let Some(mut rest) = image.get_mut(Prologue::LEN..) else {
        return image;
    };
    while let Ok((mut header, after)) = FrameHeader::read_from_prefix(rest) {
        let body_len = usize::try_from(header.length)
            .ok()
            .filter(|&len| len <= after.len())
            .map(padded);
        let Some(body_len) = body_len.filter(|&len| len <= after.len()) else {
            break;
        };
        let (frame, next) = rest.split_at_mut(FrameHeader::LEN + body_len);
        let (head, body) = frame.split_at_mut(FrameHeader::LEN);
        if header.kind == Kind::Trailer.number()
            && let Ok((trailer, _)) = Trailer::mut_from_prefix(body)
        {
            trailer.digest = digest.value();
        }
        header.checksum = header.expected_checksum(body);
        head.copy_from_slice(header.as_bytes());
        digest.add(header.checksum);
        rest = next;
    }
    image
}
