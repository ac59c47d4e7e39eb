//! Rollback of one process: against its floor, against fork-from-template, by dirty pages and size.

mod support;

use std::collections::BTreeMap;
use std::path::Path;

use support::{
    Program, Shape, checkpoint, judged, line, median, middle, misfit, ms, rollback, table,
};

const ROUNDS: usize = 101;

fn main() {
    let program = support::compile();
    against_others(&program);
    phases(&program);
    sweep(&program);
}

/// The three ways in one run on 100 MiB: floor and rollback in turns, for both must meet the same caches, then the
/// template.
fn against_others(program: &Path) {
    let mut rows = Vec::new();
    // Negative: other pages each time.
    for pages in [10i32, 100, 1000, -10, -1000] {
        let order = format!("d {pages}");
        let start = |mode: &str| Program::start(program, &[mode.to_owned(), "100".to_owned()]);
        let mut floor = start("floor");
        let mut target = Program::tree(program, Shape::plain(100));
        let (mut engine, _) = checkpoint(&target);
        let (mut floors, mut rollbacks) = (Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            floors.push(floor.ask(&order));
            target.ask(&order);
            rollbacks.push(rollback(&mut engine).0);
        }
        engine.release(None).expect("release");
        let mut template = start("template");
        let template = median(3, 31, || template.ask(&order));
        let (floor, ours) = (middle(floors), middle(rollbacks));
        let ratio = |other: f64, limit: f64| match pages {
            1000 | -1000 => judged(ours / other, limit),
            _ => format!("{:.2}", ours / other),
        };
        let times = [
            ms(ours),
            ms(floor),
            ratio(floor, 1.5),
            ms(template),
            ratio(template, 0.3),
        ];
        let which = if pages < 0 { ", others each time" } else { "" };
        rows.push([vec![format!("{}{which}", pages.abs())], times.to_vec()].concat());
    }
    let header = [
        "dirty pages",
        "rollback ms",
        "floor ms",
        "ratio",
        "kill + fork ms",
        "ratio",
    ];
    table(
        "Rollback of a 100 MiB process, scattered dirty pages (median)",
        &header,
        &rows,
    );
}

/// Where the time of a rollback goes.
fn phases(program: &Path) {
    const DIRTY: [usize; 2] = [10, 1000];
    let mut rows: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for pages in DIRTY {
        let mut target = Program::tree(program, Shape::plain(100));
        let (mut engine, _) = checkpoint(&target);
        let mut spent: BTreeMap<String, Vec<f64>> = BTreeMap::new();
        for _ in 0..ROUNDS {
            target.ask(&format!("d {pages}"));
            for (phase, microseconds) in rollback(&mut engine).1.phases {
                spent.entry(phase).or_default().push(microseconds as f64);
            }
        }
        engine.release(None).expect("release");
        for (phase, values) in spent {
            rows.entry(phase)
                .or_default()
                .push(format!("{:.0}", middle(values)));
        }
    }
    let rows: Vec<Vec<String>> = rows
        .into_iter()
        .map(|(phase, values)| [vec![phase], values].concat())
        .collect();
    table(
        "Phases of a rollback of 100 MiB (median)",
        &["phase", "10 dirty pages, us", "1,000 dirty pages, us"],
        &rows,
    );
}

fn rollback_time(program: &Path, mib: usize, pages: usize) -> f64 {
    let mut target = Program::tree(program, Shape::plain(mib));
    let (mut engine, _) = checkpoint(&target);
    let order = format!("d {pages}");
    let time = median(5, ROUNDS, || {
        target.ask(&order);
        rollback(&mut engine).0
    });
    engine.release(None).expect("release");
    time
}

fn sweep(program: &Path) {
    const SIZES: [usize; 3] = [16, 100, 1024];
    let mut rows = Vec::new();
    let mut points = [const { Vec::new() }; SIZES.len()];
    for pages in [0, 10, 100, 1000, 10_000] {
        let mut row = vec![pages.to_string()];
        for (size, points) in SIZES.into_iter().zip(&mut points) {
            // 16 MiB are 4,096 pages: there are not more to change.
            let pages = pages.min(size << 8);
            let time = rollback_time(program, size, pages);
            points.push((pages as f64, time));
            row.push(ms(time));
        }
        rows.push(row);
    }
    let header = ["dirty pages", "16 MiB, ms", "100 MiB, ms", "1 GiB, ms"];
    table(
        "Rollback by dirty pages and size (median; 16 MiB hold 4,096 pages)",
        &header,
        &rows,
    );
    let rows: Vec<Vec<String>> = SIZES
        .into_iter()
        .zip(&points)
        .map(|(size, points)| {
            let (start, slope) = line(points);
            vec![
                size.to_string(),
                format!("{start:.0}"),
                format!("{slope:.3}"),
                format!("{:.0}%", misfit(points, (start, slope)) * 100.0),
            ]
        })
        .collect();
    table(
        "The same as a line",
        &["MiB", "us", "us per dirty page", "largest misfit"],
        &rows,
    );
}
