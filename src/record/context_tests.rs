//! The context: reservations, both modes, lookup, the object table.

use std::io::{self, Write};
use std::sync::Arc;

use parking_lot::Mutex;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::*;

/// A sink that others can look into.
#[derive(Clone, Default)]
pub(super) struct Shared(pub(super) Arc<Mutex<Vec<u8>>>);

impl Write for Shared {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[derive(Debug, Clone, Copy, PartialEq, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct Pair {
    left: u64,
    right: u64,
}

fn written(context: &mut Context) -> Vec<u8> {
    let mut image = Vec::new();
    context.write_out(&mut image).unwrap();
    image
}

#[test]
fn records_are_read_back_in_place() {
    let mut context = Context::buffering().unwrap();
    let id = context.new_object();
    let pair = Pair { left: 1, right: 2 };
    let by_ref = context.put(Kind::Pipe, id, &pair, b"queued").unwrap();
    context
        .put_list(Kind::FileTable, id, &[pair, pair])
        .unwrap();
    context
        .put_json(Kind::OpenFile, id, &vec!["a", "b"])
        .unwrap();

    let record = context.record(by_ref).unwrap();
    assert_eq!(
        (record.kind(), record.id(), record.version()),
        (Kind::Pipe, id, 1)
    );
    assert_eq!(record.fixed::<Pair>().unwrap(), (&pair, &b"queued"[..]));
    assert_eq!(
        context
            .find(Kind::FileTable, id)
            .unwrap()
            .list::<Pair>()
            .unwrap(),
        &[pair, pair]
    );
    assert_eq!(
        context
            .find(Kind::FileTable, id)
            .unwrap()
            .fixed_list::<u64, u64>()
            .unwrap(),
        (&1, &[2, 1, 2][..])
    );
    assert_eq!(
        context
            .find(Kind::OpenFile, id)
            .unwrap()
            .json::<Vec<&str>>()
            .unwrap(),
        ["a", "b"]
    );
    assert!(context.find(Kind::Eventfd, id).is_none());
    let kinds: Vec<Kind> = context.records().map(|record| record.kind()).collect();
    assert_eq!(
        kinds,
        [
            Kind::ImageHeader,
            Kind::Pipe,
            Kind::FileTable,
            Kind::OpenFile
        ]
    );
}

#[test]
fn a_payload_of_another_shape_is_an_error() {
    let mut context = Context::buffering().unwrap();
    let id = context.new_object();
    context.append(Kind::Pipe, id, &[b"short"]).unwrap();
    let record = context.find(Kind::Pipe, id).unwrap();
    assert!(matches!(
        record.fixed::<Pair>(),
        Err(Error::Payload {
            kind: Kind::Pipe,
            ..
        })
    ));
    assert!(matches!(record.list::<Pair>(), Err(Error::Payload { .. })));
    assert!(matches!(record.json::<u32>(), Err(Error::Payload { .. })));
    let message = record.fixed::<Pair>().unwrap_err().to_string();
    assert_eq!(
        message,
        format!("pipe of object {id}: 5 bytes do not hold a layout of 16 bytes")
    );
}

#[test]
fn the_order_is_that_of_the_commits() {
    let mut context = Context::buffering().unwrap();
    let (outer_id, inner_id) = (context.new_object(), context.new_object());
    let outer = context.reserve(Kind::UnixSocket, outer_id, 3).unwrap();
    let inner = context.reserve(Kind::UnixSocket, inner_id, 5).unwrap();
    context.payload(&inner).copy_from_slice(b"inner");
    context.payload(&outer).copy_from_slice(b"out");
    context.commit(inner).unwrap();
    context.commit(outer).unwrap();
    let payloads: Vec<&[u8]> = context
        .records_of(Kind::UnixSocket)
        .map(|record| record.payload())
        .collect();
    assert_eq!(payloads, [&b"inner"[..], b"out"]);
}

#[test]
fn what_is_committed_does_not_move() {
    let mut context = Context::buffering().unwrap();
    let id = context.new_object();
    let first = context.append(Kind::Pipe, id, &[b"stays"]).unwrap();
    let before = context.record(first).unwrap().payload().as_ptr();
    for size in [
        10,
        CHUNK_LEN / 2,
        CHUNK_LEN - 100,
        CHUNK_LEN,
        3 * CHUNK_LEN,
        7,
    ] {
        let id = context.new_object();
        context.append(Kind::Memfd, id, &[&vec![1; size]]).unwrap();
    }
    assert_eq!(context.record(first).unwrap().payload().as_ptr(), before);
    for record in context.records() {
        assert_eq!(record.payload().as_ptr() as usize % ALIGNMENT, 0);
    }
}

#[test]
fn a_cancelled_reservation_leaves_nothing() {
    let mut context = Context::buffering().unwrap();
    let id = context.new_object();
    let before = context.stats().clone();
    let reservation = context.reserve(Kind::Pipe, id, 100).unwrap();
    context.payload(&reservation).fill(0xff);
    context.cancel(reservation);
    assert_eq!(context.stats(), &before);
    let again = context.reserve(Kind::Pipe, id, 100).unwrap();
    assert!(
        context.payload(&again).iter().all(|&byte| byte == 0),
        "reused space is zero"
    );
    context.commit(again).unwrap();
    context.finish().unwrap();
}

#[test]
fn a_leaked_reservation_is_an_error_at_the_end() {
    let mut context = Context::buffering().unwrap();
    let id = context.new_object();
    drop(context.reserve(Kind::Pipe, id, 8).unwrap());
    assert!(matches!(context.finish(), Err(Error::Open { count: 1 })));
    assert!(matches!(
        context.write_out(&mut Vec::new()),
        Err(Error::Unfinished)
    ));
}

#[test]
fn objects_are_written_once_and_before_their_users() {
    let mut context = Context::buffering().unwrap();
    let key = ObjectKey::new(Kind::Pipe, 8, 15);
    let Interned::New(pipe) = context.intern(key) else {
        panic!("first sight")
    };
    assert_eq!(context.intern(key), Interned::Known(pipe));
    assert_eq!(context.interned(key), Some(pipe));
    assert!(matches!(context.refer(pipe), Err(Error::Unwritten { .. })));
    assert_eq!(context.refer_ahead(pipe).unwrap(), pipe.raw());
    assert!(matches!(
        context.finish(),
        Err(Error::Unwritten { what: "pipe", .. })
    ));

    context.append(Kind::Pipe, pipe, &[b"x"]).unwrap();
    assert_eq!(context.refer(pipe).unwrap(), pipe.raw());
    assert!(matches!(
        context.append(Kind::Pipe, pipe, &[b"y"]),
        Err(Error::Duplicate { .. })
    ));
    let stranger = ObjectId::from_raw(999).unwrap();
    assert!(matches!(
        context.refer(stranger),
        Err(Error::UnknownObject { .. })
    ));
    assert!(matches!(
        context.append(Kind::Pipe, stranger, &[]),
        Err(Error::UnknownObject { .. })
    ));
    context.finish().unwrap();
}

#[test]
fn the_same_record_reserved_twice_is_caught_at_the_second_commit() {
    let mut context = Context::buffering().unwrap();
    let id = context.new_object();
    let one = context.reserve(Kind::Pipe, id, 1).unwrap();
    let two = context.reserve(Kind::Pipe, id, 1).unwrap();
    context.commit(one).unwrap();
    assert!(matches!(context.commit(two), Err(Error::Duplicate { .. })));
    context.finish().unwrap();
}

#[test]
fn framing_kinds_and_finished_contexts_refuse() {
    let mut context = Context::buffering().unwrap();
    let refused = context.append(Kind::Trailer, ObjectId::IMAGE, &[]);
    assert!(matches!(
        refused,
        Err(Error::Framing {
            kind: Kind::Trailer
        })
    ));
    context.finish().unwrap();
    assert!(matches!(context.finish(), Err(Error::Finished)));
    assert!(matches!(
        context.append(Kind::Tree, ObjectId::IMAGE, &[]),
        Err(Error::Finished)
    ));
}

#[test]
fn another_contexts_things_are_refused() {
    let mut one = Context::buffering().unwrap();
    let mut two = Context::buffering().unwrap();
    let reservation = one.reserve(Kind::Tree, ObjectId::IMAGE, 8).unwrap();
    assert!(matches!(two.commit(reservation), Err(Error::Foreign)));
    let reference = two.append(Kind::Tree, ObjectId::IMAGE, &[b"x"]).unwrap();
    assert!(matches!(one.record(reference), Err(Error::Foreign)));
}

#[test]
fn both_modes_write_the_same_bytes() {
    let header = ImageHeader::here();
    let fill = |context: &mut Context| {
        let id = context.new_object();
        let outer = context.reserve(Kind::Pipe, id, 9).unwrap();
        let inner = context
            .reserve(Kind::Tree, ObjectId::IMAGE, CHUNK_LEN + 1)
            .unwrap();
        context.payload(&inner).fill(3);
        context.commit(inner).unwrap();
        context.payload(&outer).fill(4);
        context.commit(outer).unwrap();
        context.finish().unwrap();
    };
    let mut buffering = Context::buffering_as(header).unwrap();
    fill(&mut buffering);
    let sink = Shared::default();
    let mut streaming = Context::streaming_as(Box::new(sink.clone()), header).unwrap();
    fill(&mut streaming);

    let image = written(&mut buffering);
    assert_eq!(image, *sink.0.lock());
    assert_eq!(image.len() as u64, buffering.stats().bytes);
    assert_eq!(
        written(&mut streaming),
        b"",
        "write-out does nothing when streaming"
    );
    assert_eq!(streaming.stats(), buffering.stats());
    assert_eq!(streaming.records().len(), 0);
}

#[test]
fn streaming_reuses_its_buffer() {
    let mut context = Context::streaming(Box::new(io::sink())).unwrap();
    let content = vec![5; CHUNK_LEN / 3];
    for _ in 0..50 {
        let id = context.new_object();
        let reference = context.append(Kind::Memfd, id, &[&content]).unwrap();
        assert!(matches!(context.record(reference), Err(Error::NotKept)));
    }
    let id = context.new_object();
    context
        .append(Kind::Memfd, id, &[&vec![5; 4 * CHUNK_LEN]])
        .unwrap();
    assert_eq!(context.mapped_bytes(), CHUNK_LEN);
    context.finish().unwrap();
}

#[test]
fn a_failing_sink_breaks_the_context() {
    struct Full(usize);
    impl Write for Full {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            if self.0 < bytes.len() {
                return Err(io::Error::from(io::ErrorKind::StorageFull));
            }
            self.0 -= bytes.len();
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let mut context = Context::streaming(Box::new(Full(1000))).unwrap();
    let id = context.new_object();
    assert!(matches!(
        context.append(Kind::Pipe, id, &[&[0; 2000]]),
        Err(Error::Sink(_))
    ));
    assert!(matches!(context.finish(), Err(Error::Broken)));
    assert!(matches!(
        context.write_out(&mut io::sink()),
        Err(Error::Broken)
    ));
}

#[test]
fn an_error_record_says_why() {
    let mut context = Context::buffering().unwrap();
    let id = context.new_object();
    let left_open = context.reserve(Kind::Pipe, id, 8).unwrap();
    context.fail("fd 7: io_uring").unwrap();
    assert_eq!(context.failure().as_deref(), Some("fd 7: io_uring"));
    assert!(matches!(context.commit(left_open), Err(Error::Finished)));
    assert!(!written(&mut context).is_empty());
}

#[test]
fn statistics_count_by_kind() {
    let mut context = Context::buffering().unwrap();
    for len in [1, 8, 9] {
        let id = context.new_object();
        context.append(Kind::Pipe, id, &[&vec![0; len]]).unwrap();
    }
    let pipes = context.stats().by_kind[&Kind::Pipe];
    assert_eq!(
        pipes,
        KindStats {
            records: 3,
            payload_bytes: 18,
            bytes: 3 * 32 + 8 + 8 + 16
        }
    );
    let table = context.stats().to_string();
    assert!(
        table
            .lines()
            .any(|line| line.starts_with("pipe ") && line.contains(" 18 ")),
        "{table}"
    );
    let json = serde_json::to_value(context.stats()).unwrap();
    assert_eq!(json["by_kind"]["pipe"]["records"], 3);
    let bytes = context.stats().bytes;
    assert!((context.stats().percent_of_total(bytes) - 50.0).abs() < 1e-9);
}

#[test]
fn a_context_goes_between_threads() {
    fn movable<T: Send + Sync>() {}
    movable::<Context>();
}
