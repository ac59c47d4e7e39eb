//! Properties of contexts and images, over random ones.

use std::io::{Cursor, Read};

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::{Index, select};

use super::context_tests::Shared;
use super::decode_tests::{fixed_header, image_of};
use super::fuzzing::with_right_checksums;
use super::*;

/// One call on a context. Indices choose among the reservations that are open.
#[derive(Debug, Clone)]
enum Call {
    Reserve { kind: Kind, content: Vec<u8> },
    Commit(Index),
    Cancel(Index),
    Append { kind: Kind, parts: Vec<Vec<u8>> },
}

fn kinds() -> impl Strategy<Value = Kind> {
    let free: Vec<Kind> = Kind::ALL
        .iter()
        .copied()
        .filter(|kind| !kind.is_framing())
        .collect();
    select(free)
}

fn contents() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        8 => vec(any::<u8>(), 0..100),
        1 => (any::<u8>(), 1..CHUNK_LEN + 5000).prop_map(|(byte, len)| vec![byte; len]),
    ]
}

fn calls() -> impl Strategy<Value = Vec<Call>> {
    let call = prop_oneof![
        (kinds(), contents()).prop_map(|(kind, content)| Call::Reserve { kind, content }),
        any::<Index>().prop_map(Call::Commit),
        any::<Index>().prop_map(Call::Cancel),
        (kinds(), vec(contents(), 0..3)).prop_map(|(kind, parts)| Call::Append { kind, parts }),
    ];
    vec(call, 0..40)
}

/// What the image has to hold, in order.
type Expected = Vec<(Kind, ObjectId, Vec<u8>)>;

/// Makes the calls and returns what was committed.
fn make(context: &mut Context, calls: &[Call]) -> Expected {
    let mut open: Vec<(Reservation, Vec<u8>)> = Vec::new();
    let mut expected = Expected::new();
    let commit = |context: &mut Context, (reservation, content): (Reservation, Vec<u8>)| {
        let (kind, id) = (reservation.kind(), reservation.id());
        assert_eq!(
            context.payload(&reservation),
            &content[..],
            "others' work leaves it alone"
        );
        context.commit(reservation).unwrap();
        (kind, id, content)
    };
    for call in calls {
        match call {
            Call::Reserve { kind, content } => {
                let id = context.new_object();
                let reservation = context.reserve(*kind, id, content.len()).unwrap();
                let payload = context.payload(&reservation);
                assert!(payload.iter().all(|&byte| byte == 0), "fresh space is zero");
                payload.copy_from_slice(content);
                open.push((reservation, content.clone()));
            }
            Call::Commit(index) if !open.is_empty() => {
                let chosen = open.swap_remove(index.index(open.len()));
                expected.push(commit(context, chosen));
            }
            Call::Cancel(index) if !open.is_empty() => {
                let (reservation, content) = open.swap_remove(index.index(open.len()));
                let id = reservation.id();
                context.cancel(reservation);
                // The object was given out, so a record of it is owed.
                context.append(Kind::Pipe, id, &[&content]).unwrap();
                expected.push((Kind::Pipe, id, content));
            }
            Call::Commit(_) | Call::Cancel(_) => {}
            Call::Append { kind, parts } => {
                let id = context.new_object();
                let slices: Vec<&[u8]> = parts.iter().map(Vec::as_slice).collect();
                context.append(*kind, id, &slices).unwrap();
                expected.push((*kind, id, parts.concat()));
            }
        }
    }
    while let Some(last) = open.pop() {
        expected.push(commit(context, last));
    }
    context.finish().unwrap();
    expected
}

fn content_of(context: &Context) -> Expected {
    let free = context
        .records()
        .filter(|record| !record.kind().is_framing());
    free.map(|record| (record.kind(), record.id(), record.payload().to_vec()))
        .collect()
}

/// A small image, for damage.
fn small_image(contents: &[Vec<u8>]) -> Vec<u8> {
    let mut context = Context::buffering_as(fixed_header()).unwrap();
    for content in contents {
        let id = context.new_object();
        context.append(Kind::Pipe, id, &[content]).unwrap();
    }
    context.finish().unwrap();
    image_of(&mut context)
}

/// A source that gives as little as it is told to.
struct Dribble {
    image: Cursor<Vec<u8>>,
    steps: Vec<usize>,
    turn: usize,
}

impl Read for Dribble {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let step = self.steps[self.turn % self.steps.len()].min(buffer.len());
        self.turn += 1;
        self.image.read(&mut buffer[..step])
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn whatever_is_committed_comes_back_from_both_modes(calls in calls()) {
        let mut buffering = Context::buffering_as(fixed_header()).unwrap();
        let expected = make(&mut buffering, &calls);
        prop_assert_eq!(&content_of(&buffering), &expected);

        let sink = Shared::default();
        let mut streaming = Context::streaming_as(Box::new(sink.clone()), fixed_header()).unwrap();
        make(&mut streaming, &calls);
        let image = image_of(&mut buffering);
        prop_assert!(*sink.0.lock() == image, "both modes give the same bytes");
        prop_assert_eq!(streaming.stats(), buffering.stats());

        let mut loaded = Context::load(&image[..]).unwrap();
        prop_assert_eq!(content_of(&loaded), expected);
        prop_assert_eq!(loaded.stats(), buffering.stats());
        prop_assert!(image_of(&mut loaded) == image);
    }

    #[test]
    fn read_ahead_gives_what_load_gives_however_the_bytes_come(
        calls in calls(),
        steps in vec(1_usize..100_000, 1..8),
    ) {
        let mut context = Context::buffering_as(fixed_header()).unwrap();
        make(&mut context, &calls);
        let source = Dribble { image: Cursor::new(image_of(&mut context)), steps, turn: 0 };
        let mut ahead = read_ahead(source);
        for record in context.records() {
            prop_assert_eq!(ahead.next().unwrap(), Some(record));
        }
        prop_assert_eq!(ahead.next().unwrap(), None);
    }

    #[test]
    fn a_truncated_image_is_never_accepted(
        contents in vec(vec(any::<u8>(), 0..50), 0..6),
        cut in any::<Index>(),
    ) {
        let image = small_image(&contents);
        let len = cut.index(image.len());
        match Context::load(&image[..len]) {
            Err(Error::Truncated { at, missing }) => {
                prop_assert!(missing > 0 && at.offset <= len as u64);
            }
            Err(Error::NotAnImage { .. }) => prop_assert!(len < MAGIC.len()),
            other => prop_assert!(false, "{:?}", other),
        }
    }

    #[test]
    fn flipped_bits_are_never_accepted(
        contents in vec(vec(any::<u8>(), 0..50), 0..6),
        flips in vec((any::<Index>(), 0..8_u8), 1..4),
    ) {
        let image = small_image(&contents);
        let mut bad = image.clone();
        for (index, bit) in flips {
            bad[index.index(image.len())] ^= 1 << bit;
        }
        fuzz_one(&bad);
        prop_assert!(bad == image || Context::load(&bad[..]).is_err());
    }

    #[test]
    fn pieces_in_another_order_are_never_accepted(
        contents in vec(vec(any::<u8>(), 0..50), 2..6),
        one in any::<Index>(),
        two in any::<Index>(),
    ) {
        let image = small_image(&contents);
        let mut pieces: Vec<&[u8]> = image.chunks(8).collect();
        let (one, two) = (one.index(pieces.len()), two.index(pieces.len()));
        pieces.swap(one, two);
        let bad = pieces.concat();
        prop_assert!(bad == image || Context::load(&bad[..]).is_err());
    }

    #[test]
    fn noise_is_never_accepted_and_never_panics(
        noise in vec(any::<u8>(), 0..300),
        keep in 0_usize..60,
    ) {
        let image = small_image(&[]);
        let input = [&image[..keep.min(image.len())], &noise].concat();
        fuzz_one(&input);
    }

    #[test]
    fn damage_behind_right_checksums_never_panics(
        contents in vec(vec(any::<u8>(), 0..50), 0..6),
        changes in vec((any::<Index>(), any::<u8>()), 1..6),
    ) {
        let mut image = small_image(&contents);
        prop_assert!(with_right_checksums(&image) == image, "an intact image has the right ones");
        for (index, byte) in changes {
            let at = index.index(image.len());
            image[at] = byte;
        }
        fuzz_one(&image);
    }
}
