//! Files of a container: what a rollback costs by what has changed and by what there is, and what they add to the stop.

mod support;

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::time::Instant;

use support::container::Container;
use support::{judged, middle, ms, table};

const ROUNDS: usize = 9;
const MIB: usize = 1 << 20;
const LARGE: usize = 1024 * MIB;
const CHANGED: usize = 10;

fn main() {
    let few = ten_changed(CHANGED);
    let many = ten_changed(100_000);
    table(
        "Rollback of 10 files that were changed (median of 9, process start not included)",
        &["files there are", "rollback ms", "ratio"],
        &[
            vec![CHANGED.to_string(), ms(few), String::new()],
            vec!["100000".to_owned(), ms(many), judged(many / few, 3.0)],
        ],
    );
    large();
}

/// A container that waits.
fn idle() -> Container {
    Container::start(&["busybox", "--", "sleep", "100000"])
}

fn rollback(container: &Container) -> f64 {
    number(&container.json(&["rollback", "--json"]), "total_us")
}

fn number(report: &serde_json::Value, field: &str) -> f64 {
    report[field].as_f64().expect("a number")
}

fn ten_changed(count: usize) -> f64 {
    let container = idle();
    let path = |number: usize| {
        let directory = container.path(&format!("/many/{}", number % 100));
        (directory.clone(), directory.join(number.to_string()))
    };
    for number in 0..count {
        let (directory, file) = path(number);
        fs::create_dir_all(directory).expect("making a directory");
        fs::write(file, format!("content of {number}")).expect("writing a file");
    }
    container.ask(&["checkpoint"]);
    let round = |round: usize| {
        for number in 0..CHANGED {
            let (_, file) = path(number * (count / CHANGED));
            fs::write(file, format!("changed in round {round}")).expect("writing a file");
        }
        let time = rollback(&container);
        assert_eq!(
            fs::read(path(0).1).expect("reading a file"),
            b"content of 0"
        );
        time
    };
    round(0);
    middle((0..ROUNDS).map(round).collect())
}

fn large() {
    let container = idle();
    let without = stop_windows(&container, &["--no-files"]);
    let path = container.path("/large");
    let mut file = fs::File::create(&path).expect("making a file");
    for number in 0..LARGE / MIB {
        file.write_all(&vec![number as u8; MIB])
            .expect("writing a file");
    }
    container.ask(&["checkpoint"]);
    let round = |_| {
        file.write_all_at(&[0xee; 4096], (LARGE / 2) as u64)
            .expect("writing a page");
        rollback(&container)
    };
    round(0);
    let back = middle((0..ROUNDS).map(round).collect());
    let read = middle((0..3).map(|_| time_of_reading(&path)).collect());
    table(
        "A file of 1 GiB of which one page was changed",
        &["rollback ms", "one read of the file ms", "ratio"],
        &[vec![ms(back), ms(read), judged(back / read, 1.0)]],
    );
    let with = stop_windows(&container, &[]);
    table(
        "Stop window of a checkpoint (median of 9)",
        &["without files ms", "with 1 GiB unchanged ms", "ratio"],
        &[vec![ms(without), ms(with), judged(with / without, 1.5)]],
    );
}

/// The stop of a checkpoint that is the only one each time: content is kept anew.
fn stop_windows(container: &Container, options: &[&str]) -> f64 {
    let arguments = [&["checkpoint", "--json"], options].concat();
    let round = |_| {
        let report = container.json(&arguments);
        container.ask(&["release"]);
        number(&report, "stop_us")
    };
    middle((0..ROUNDS).map(round).collect())
}

fn time_of_reading(path: &std::path::Path) -> f64 {
    let began = Instant::now();
    let mut file = fs::File::open(path).expect("opening a file");
    let mut buffer = vec![0; MIB];
    while file.read(&mut buffer).expect("reading a file") > 0 {}
    began.elapsed().as_secs_f64() * 1e6
}
