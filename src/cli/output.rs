//! Printing that survives a closed standard output or error.

use std::io::{self, ErrorKind, Write};

use anyhow::Context;
use serde::Serialize;

use super::{Global, log};

/// Writes `text` to standard output. A reader that went away is no error: what the verb did is done all the same.
pub(crate) fn print(text: &str) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            Err(error).context("writing to standard output")
        }
        _ => Ok(()),
    }
}

/// Writes `value` as one JSON document with a newline at its end.
pub(crate) fn json(value: &impl Serialize) -> anyhow::Result<()> {
    let mut text = serde_json::to_string_pretty(value).context("encoding the output")?;
    text.push('\n');
    print(&text)
}

/// Writes `value` as a line of JSON.
pub(crate) fn json_line(value: &impl Serialize) -> anyhow::Result<()> {
    let mut text = serde_json::to_string(value).context("encoding the output")?;
    text.push('\n');
    print(&text)
}

/// Lays rows out in columns, each as wide as its widest cell and two spaces.
pub(crate) fn columns<const N: usize>(rows: &[[String; N]]) -> String {
    let widths: [usize; N] = std::array::from_fn(|column| {
        let cells = rows.iter().map(|row| row[column].chars().count());
        cells.max().unwrap_or(0)
    });
    let line = |row: &[String; N]| {
        let cells = row
            .iter()
            .zip(widths)
            .map(|(cell, width)| format!("{cell:width$}  "));
        let line: String = cells.collect();
        format!("{}\n", line.trim_end())
    };
    rows.iter().map(line).collect()
}

/// Reports an error with its causes, on standard error and in the log file if there is one, where callers such as
/// podman read the reason of a failure.
pub(crate) fn error(global: &Global, error: &anyhow::Error) {
    let message = format!("{error:#}");
    log::error(global, &message);
    // Standard error may be closed; then nobody listens.
    let _ = writeln!(io::stderr(), "snapback: {message}");
}
