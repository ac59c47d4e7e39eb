//! The log: a file or standard error, text or JSON lines as runc writes them, set up only when asked for.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::Path;
use std::sync::Mutex;

use anyhow::{Context, bail};
use clap::ValueEnum;
use tracing::field::{Field, Visit};
use tracing::{Event, Subscriber};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

use super::Global;

/// How a log line looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// `time="…" level=… msg="…"`
    Text,
    /// `{"level":…,"msg":…,"time":…}`
    Json,
}

/// Sets the log up: with `--debug` everything that libcontainer and snapback tell, filtered by `RUST_LOG` if that is
/// set. Without it only the final error is logged, by [`error`], and no subscriber is installed.
pub(super) fn start(global: &Global) -> anyhow::Result<()> {
    if global.systemd_cgroup {
        bail!(
            "--systemd-cgroup: cgroups are made through the file system only; run without it (podman: cgroup_manager=\"cgroupfs\")"
        );
    }
    if !global.debug {
        return Ok(());
    }
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("debug"));
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .event_format(Line(global.log_format));
    match &global.log {
        Some(path) => subscriber.with_writer(Mutex::new(open(path)?)).init(),
        None => {
            // The processes that libcontainer makes from us have the program's standard error: not ours to write to.
            let me = std::process::id();
            let writer = move || -> Box<dyn Write> {
                if std::process::id() == me {
                    Box::new(std::io::stderr())
                } else {
                    Box::new(std::io::sink())
                }
            };
            subscriber.with_writer(writer).init();
        }
    }
    Ok(())
}

/// Appends the error a verb ended with to the log file, if there is one.
pub(super) fn error(global: &Global, message: &str) {
    let Some(path) = &global.log else { return };
    let mut time = String::new();
    let line = SystemTime
        .format_time(&mut Writer::new(&mut time))
        .map(|()| line(global.log_format, "error", message, &time));
    if let (Ok(line), Ok(mut file)) = (line, open(path)) {
        // The error itself is still told on standard error.
        let _ = file.write_all(line.as_bytes());
    }
}

fn open(path: &Path) -> anyhow::Result<File> {
    OpenOptions::new()
        .append(true)
        .create(true)
        .open(path)
        .with_context(|| format!("opening the log file {}", path.display()))
}

fn line(format: Format, level: &str, message: &str, time: &str) -> String {
    match format {
        Format::Text => format!("time=\"{time}\" level={level} msg={message:?}\n"),
        Format::Json => {
            format!(
                "{}\n",
                serde_json::json!({ "level": level, "msg": message, "time": time })
            )
        }
    }
}

struct Line(Format);

impl<S, N> FormatEvent<S, N> for Line
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        _: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let mut time = String::new();
        SystemTime.format_time(&mut Writer::new(&mut time))?;
        let mut message = Message::default();
        event.record(&mut message);
        let level = event.metadata().level().as_str().to_ascii_lowercase();
        writer.write_str(&line(
            self.0,
            &level,
            &format!("{}{}", message.text, message.fields),
            &time,
        ))
    }
}

/// Collects the message of an event and its other fields as ` name=value`.
#[derive(Default)]
struct Message {
    text: String,
    fields: String,
}

impl Visit for Message {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        use fmt::Write as _;
        // Writing to a String can't fail.
        let _ = match field.name() {
            "message" => write!(self.text, "{value:?}"),
            name => write!(self.fields, " {name}={value:?}"),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_have_runcs_shape() {
        assert_eq!(
            line(Format::Text, "error", "no \"x\"", "T"),
            "time=\"T\" level=error msg=\"no \\\"x\\\"\"\n"
        );
        let json: serde_json::Value =
            serde_json::from_str(&line(Format::Json, "error", "no \"x\"", "T")).unwrap();
        assert_eq!(
            json,
            serde_json::json!({ "level": "error", "msg": "no \"x\"", "time": "T" })
        );
    }
}
