//! `kill`: send a signal to a container.

use std::str::FromStr;

use clap::Args;
use nix::sys::signal::Signal;

use super::{Global, Status};
use crate::container::lifecycle;

/// Options of `kill`.
#[derive(Debug, Args)]
pub(crate) struct Kill {
    /// The container
    #[arg(value_name = "ID")]
    container_id: String,
    /// Name or number of the signal
    #[arg(default_value = "SIGTERM", value_parser = parse)]
    signal: i32,
    /// Send it to all processes of the container, not only to the first
    #[arg(short, long)]
    all: bool,
}

pub(super) fn run(global: &Global, args: &Kill) -> anyhow::Result<Status> {
    lifecycle::kill(&global.root, &args.container_id, args.signal, args.all)?;
    Ok(Status::Done)
}

/// A signal by number, or by name with or without `SIG`; real-time signals as `RTMIN+n` or `RTMAX-n`.
fn parse(text: &str) -> Result<i32, String> {
    let unknown = || format!("unknown signal {text:?}");
    let name = text.to_ascii_uppercase();
    let name = name.strip_prefix("SIG").unwrap_or(&name);
    let number = if let Ok(number) = name.parse() {
        number
    } else if let Some(offset) = name.strip_prefix("RTMIN") {
        libc::SIGRTMIN()
            + if offset.is_empty() {
                0
            } else {
                offset.parse().map_err(|_| unknown())?
            }
    } else if let Some(offset) = name.strip_prefix("RTMAX") {
        libc::SIGRTMAX()
            + if offset.is_empty() {
                0
            } else {
                offset.parse().map_err(|_| unknown())?
            }
    } else {
        Signal::from_str(&format!("SIG{name}")).map_err(|_| unknown())? as i32
    };
    if (1..=libc::SIGRTMAX()).contains(&number) {
        Ok(number)
    } else {
        Err(unknown())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_go_by_name_and_number() {
        for (text, number) in [
            ("9", 9),
            ("KILL", 9),
            ("SIGKILL", 9),
            ("sigterm", 15),
            ("37", 37),
            ("RTMIN+3", 37),
        ] {
            assert_eq!(parse(text), Ok(number), "{text}");
        }
        for bad in ["", "0", "65", "-1", "SIGNONE", "RTMIN+x"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
