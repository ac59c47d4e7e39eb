//! Checkpoints after the first: stop window and memory by dirty pages and size, and rollbacks among them.

mod support;

use std::collections::BTreeMap;
use std::path::Path;

use snapback::engine::RollbackOptions;
use support::{Program, Shape, checkpoint, judged, middle, ms, table};

/// Increments of each kind.
const ROUNDS: usize = 21;

fn main() {
    let program = support::compile();
    let mut rows = Vec::new();
    let mut phases = BTreeMap::new();
    for mib in [100, 1024] {
        let full = full(&program, mib);
        for pages in [10, 100, 1000, -1000, 10_000] {
            rows.push(row(&program, mib, pages, full, &mut phases));
        }
    }
    let header = [
        "MiB",
        "dirty pages",
        "stop ms",
        "first checkpoint ms",
        "memory KiB",
        "of the dirty pages",
        "rollback to any ms",
    ];
    table("Increments (median of 21)", &header, &rows);
    println!(
        "Memory: by how much the resident memory of the process that holds them grows with each, headers and index included.\n\
         Rollback: to any of them in turn, from any other, with as many pages dirty.\n"
    );
    let rows: Vec<Vec<String>> = phases
        .into_iter()
        .map(|(phase, values)| vec![phase, format!("{:.0}", middle(values))])
        .collect();
    table(
        "Phases of an increment of 1,000 dirty pages of 1 GiB (median)",
        &["phase", "us"],
        &rows,
    );
}

/// The stop of a checkpoint that is no increment.
fn full(program: &Path, mib: usize) -> f64 {
    let stops = (0..5).map(|_| {
        let target = Program::tree(program, Shape::plain(mib));
        let (mut engine, report) = checkpoint(&target);
        engine.release(None).expect("release");
        report.stop_us as f64
    });
    middle(stops.collect())
}

fn row(
    program: &Path,
    mib: usize,
    pages: i32,
    full: f64,
    phases: &mut BTreeMap<String, Vec<f64>>,
) -> Vec<String> {
    let order = format!("d {pages}");
    let mut target = Program::tree(program, Shape::plain(mib));
    let (mut engine, _) = checkpoint(&target);
    let (mut stops, mut sizes, mut dirty) = (Vec::new(), Vec::new(), 0);
    for round in 0..ROUNDS {
        target.ask(&order);
        let before = resident();
        let report = engine.take(&round.to_string()).expect("checkpoint");
        sizes.push(resident() - before);
        stops.push(report.stop_us as f64);
        dirty = report.dirty_pages;
        if (mib, pages) == (1024, 1000) {
            for (phase, spent) in report.phases {
                phases.entry(phase).or_default().push(spent as f64);
            }
        }
    }
    let mut back = Vec::new();
    for round in 0..ROUNDS {
        target.ask(&order);
        let to = (round * 8 % ROUNDS).to_string();
        let options = RollbackOptions { verify: false };
        let report = engine.rollback(&to, options).expect("rollback");
        back.push(report.stop_us as f64);
    }
    engine.release(None).expect("release");
    let (stop, size) = (middle(stops), middle(sizes));
    let share = size * 1024.0 / (dirty as f64 * 4096.0);
    let which = if pages < 0 { ", others each time" } else { "" };
    vec![
        mib.to_string(),
        format!("{}{which}", pages.abs()),
        match (mib, pages) {
            (1024, 1000) => format!("{} (at most 5: {})", ms(stop), said(stop <= 5000.0)),
            _ => ms(stop),
        },
        ms(full),
        format!("{size:.0}"),
        match pages {
            1000 | -1000 => judged(share, 1.1),
            _ => format!("{share:.2}"),
        },
        ms(middle(back)),
    ]
}

fn said(kept: bool) -> &'static str {
    if kept { "kept" } else { "MISSED" }
}

/// Resident memory of this process in KiB.
fn resident() -> f64 {
    let text = std::fs::read_to_string("/proc/self/status").expect("reading our status");
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let number = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
    number.expect("VmRSS")
}
