//! Writing a checkpoint to disk, against `cp` of the same bytes, and reading it.

mod support;

use std::path::Path;
use std::process::Command;
use std::time::Instant;

use snapback::engine::{Engine, Target};
use snapback::image::{Encoding, Opened, Options};
use snapback::memory::Span;
use support::{NAME, Program, Shape, compile, judged, middle, ms, table};

const ROUNDS: usize = 5;

fn main() {
    let program = compile();
    // In memory, so that no disk is measured.
    let directory = tempfile::Builder::new()
        .prefix("snapback-bench-")
        .tempdir_in("/dev/shm")
        .expect("making a directory");
    let mut rows = Vec::new();
    for mib in [100, 1000] {
        for encoding in [Encoding::Plain, Encoding::Zstd] {
            rows.push(one(&program, directory.path(), mib, encoding));
        }
    }
    let header = [
        "resident MiB",
        "pages",
        "persist ms",
        "cp ms",
        "ratio",
        "open ms",
        "read all ms",
        "image MiB",
    ];
    table("Persist, on tmpfs (median)", &header, &rows);
}

/// One size: both ways in turns, each to a place that has nothing yet.
fn one(program: &Path, directory: &Path, mib: usize, encoding: Encoding) -> Vec<String> {
    let target = Program::tree(program, Shape::plain(mib));
    let mut engine = Engine::attach(Target::of_pid(target.pid())).expect("attaching");
    engine.take(NAME).expect("a checkpoint");
    let (image, copy) = (directory.join("image"), directory.join("copy"));
    let (mut written, mut copied, mut opened, mut read) = (vec![], vec![], vec![], vec![]);
    let mut bytes = 0;
    for _ in 0..ROUNDS {
        for path in [&image, &copy] {
            // Not there in the first round.
            let _ = std::fs::remove_dir_all(path);
        }
        let options = Options {
            encoding,
            ..Options::default()
        };
        written.push(timed(|| {
            let persisting = engine.persist(NAME, &image, options).expect("persisting");
            bytes = persisting.run().expect("persisting").image_bytes;
        }));
        copied.push(timed(|| {
            let mut command = Command::new("cp");
            let done = command.arg("-r").args([&image, &copy]).status();
            assert!(done.expect("running cp").success());
        }));
        let mut image_of = None;
        opened.push(timed(|| {
            image_of = Some(Opened::open(&image).expect("an image"));
        }));
        let image_of = image_of.expect("opened");
        read.push(timed(|| read_all(&image_of)));
    }
    let (written, copied) = (middle(written), middle(copied));
    vec![
        mib.to_string(),
        format!("{encoding:?}"),
        ms(written),
        ms(copied),
        match encoding {
            Encoding::Plain => judged(written / copied, 2.0),
            Encoding::Zstd => format!("{:.2}", written / copied),
        },
        ms(middle(opened)),
        ms(middle(read)),
        format!("{:.1}", bytes as f64 / f64::from(1 << 20)),
    ]
}

fn read_all(opened: &Opened) {
    const PIECE: u64 = 1 << 20;
    let mut buffer = vec![0; PIECE as usize];
    for id in opened.spaces.keys() {
        for run in opened.runs(*id) {
            let end = run.address + u64::from(run.pages) * 4096;
            let span = Span {
                start: run.address,
                end,
            };
            let len = (end - run.address) as usize;
            opened
                .read(*id, &[span], &mut buffer[..len])
                .expect("its pages");
        }
    }
}

fn timed(work: impl FnOnce()) -> f64 {
    let began = Instant::now();
    work();
    began.elapsed().as_secs_f64() * 1e6
}
