//! Rollback and checkpoint by threads, processes, descriptors and mappings.

mod support;

use std::path::Path;

use support::{Program, Shape, checkpoint, line, median, misfit, ms, rollback, table};

/// A dimension of the tree: its name, the values and how to set one.
type Dimension = (&'static str, [usize; 3], fn(usize) -> Shape);

const DIMENSIONS: [Dimension; 4] = [
    ("thread", [1, 10, 100], |threads| Shape {
        threads,
        ..Shape::plain(4)
    }),
    ("process", [1, 10, 100], |processes| Shape {
        processes,
        ..Shape::plain(4)
    }),
    ("descriptor", [10, 100, 1000], |descriptors| Shape {
        descriptors,
        ..Shape::plain(4)
    }),
    ("mapping", [20, 200, 2000], |vmas| Shape {
        vmas,
        ..Shape::plain(4)
    }),
];

fn main() {
    let program = support::compile();
    let (mut rows, mut lines) = (Vec::new(), Vec::new());
    for (name, values, shape) in DIMENSIONS {
        let mut points = Vec::new();
        for value in values {
            let (stop, time) = one(&program, shape(value));
            points.push((value as f64, time));
            rows.push(vec![name.to_owned(), value.to_string(), ms(time), ms(stop)]);
        }
        let (start, slope) = line(&points);
        lines.push(vec![
            name.to_owned(),
            format!("{start:.0}"),
            format!("{slope:.1}"),
            format!("{:.0}%", misfit(&points, (start, slope)) * 100.0),
        ]);
    }
    let header = ["of", "number", "rollback ms", "first checkpoint's stop ms"];
    table(
        "Rollback by the shape of the tree, nothing dirty (median)",
        &header,
        &rows,
    );
    table(
        "The same as lines",
        &["of", "us", "us for each", "largest misfit"],
        &lines,
    );
}

fn one(program: &Path, shape: Shape) -> (f64, f64) {
    let target = Program::tree(program, shape);
    let (mut engine, report) = checkpoint(&target);
    let time = median(3, 31, || rollback(&mut engine).0);
    engine.release(None).expect("release");
    (report.stop_us as f64, time)
}
