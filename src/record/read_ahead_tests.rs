//! Read-ahead: what is there is given, what is not is waited for, and every end is told.

use std::io::{self, Cursor, Read, Write};
use std::time::{Duration, Instant};

use super::decode_tests::{frames, image_of, sample};
use super::*;

#[test]
fn read_ahead_gives_records_before_the_image_is_whole() {
    let image = sample();
    let (source, mut sink) = io::pipe().unwrap();
    let mut ahead = read_ahead(source);
    let third = frames(&image)[2];
    sink.write_all(&image[..third]).unwrap();
    assert_eq!(ahead.next().unwrap().unwrap().kind(), Kind::ImageHeader);
    assert_eq!(ahead.next().unwrap().unwrap().payload(), b"first");
    assert_eq!(ahead.ready(), 0);
    let waiting = std::thread::spawn(move || {
        let mut rest = Vec::new();
        while let Some(record) = ahead.next().unwrap() {
            assert_eq!(record.payload().as_ptr() as usize % ALIGNMENT, 0);
            rest.push((record.sequence(), record.kind(), record.payload().len()));
        }
        rest
    });
    sink.write_all(&image[third..]).unwrap();
    drop(sink);
    let rest = waiting.join().unwrap();
    assert_eq!(
        rest,
        [
            (2, Kind::Pipe, 0),
            (3, Kind::Pipe, 16),
            (4, Kind::Trailer, 24)
        ]
    );
}

#[test]
fn read_ahead_reports_an_error_after_what_was_good() {
    let image = sample();
    let cut = image[..frames(&image)[2] + 5].to_vec();
    let mut ahead = read_ahead(Cursor::new(cut));
    assert!(ahead.next().unwrap().is_some());
    assert!(ahead.next().unwrap().is_some());
    assert!(matches!(ahead.next(), Err(Error::Truncated { at, .. }) if at.record == 2));
    assert!(matches!(ahead.next(), Err(Error::Broken)));
    assert!(matches!(ahead.into_context(), Err(Error::Broken)));
}

#[test]
fn read_ahead_becomes_a_context() {
    let image = sample();
    let mut ahead = read_ahead(Cursor::new(image.clone()));
    ahead.next().unwrap();
    let mut context = ahead.into_context().unwrap();
    assert_eq!(image_of(&mut context), image);
}

#[test]
fn a_source_that_panics_does_not_leave_the_cursor_waiting() {
    struct Panicking;
    impl Read for Panicking {
        fn read(&mut self, _buffer: &mut [u8]) -> io::Result<usize> {
            std::panic::resume_unwind(Box::new("a source that panics"));
        }
    }
    assert!(matches!(
        read_ahead(Panicking).next(),
        Err(Error::ReaderDied)
    ));
}

#[test]
fn a_dropped_read_ahead_ends_its_thread() {
    let image = sample();
    let (source, mut sink) = io::pipe().unwrap();
    drop(read_ahead(source));
    // The write end breaks when the thread has gone and closed its end.
    let end = frames(&image)[1];
    sink.write_all(&image[..end]).unwrap_or_default();
    let deadline = Instant::now() + Duration::from_secs(10);
    while sink.write_all(&image[end..end + 1]).is_ok() {
        assert!(Instant::now() < deadline, "the thread still reads");
        std::thread::yield_now();
    }
}
