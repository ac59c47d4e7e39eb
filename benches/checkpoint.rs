//! The first checkpoint: its stop window against a bare fork, and the memory it takes.

mod support;

use std::path::Path;

use support::{Program, Shape, checkpoint, judged, middle, ms, table};

fn main() {
    let program = support::compile();
    let rows: Vec<Vec<String>> = [16, 100, 1024]
        .into_iter()
        .map(|mib| row(&program, mib))
        .collect();
    let header = [
        "MiB",
        "fork ms",
        "stop ms",
        "ratio",
        "headers KiB",
        "of resident",
        "page tables KiB",
        "all memory KiB",
    ];
    table(
        "First checkpoint of a process (median of 9)",
        &header,
        &rows,
    );
    println!(
        "Page tables: those of the shadow. All memory: how much less the machine had free afterwards, which other\n\
         programs disturb.\n"
    );
}

fn row(program: &Path, mib: usize) -> Vec<String> {
    let [mut forks, mut stops, mut tables, mut used] = [const { Vec::new() }; 4];
    let mut headers = 0;
    for _ in 0..9 {
        let mut target = Program::tree(program, Shape::plain(mib));
        forks.push(middle((0..5).map(|_| target.ask("f")).collect()));
        let (before, table_before) = (memory("MemFree"), memory("PageTables"));
        let (mut engine, report) = checkpoint(&target);
        let (after, table_after) = (memory("MemFree"), memory("PageTables"));
        stops.push(report.stop_us as f64);
        headers = report.header_bytes;
        tables.push(table_after - table_before);
        used.push(before - after);
        engine.release(None).expect("release");
    }
    let (fork, stop) = (middle(forks), middle(stops));
    let share = headers as f64 / (mib << 20) as f64 * 100.0;
    vec![
        mib.to_string(),
        ms(fork),
        ms(stop),
        judged(stop / fork, 2.5),
        format!("{:.1}", headers as f64 / 1024.0),
        format!("{share:.3}%"),
        format!("{:.0}", middle(tables)),
        format!("{:.0}", middle(used)),
    ]
}

/// A line of `/proc/meminfo` in KiB.
fn memory(name: &str) -> f64 {
    let text = std::fs::read_to_string("/proc/meminfo").expect("reading /proc/meminfo");
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    let number = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
    number.unwrap_or_else(|| panic!("no {name} in /proc/meminfo"))
}
