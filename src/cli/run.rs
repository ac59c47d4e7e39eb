//! `run`: create and start a container; in the foreground, stay with it, then delete it.

use std::path::Path;

use clap::Args;

use super::create::{OVERLAY_HELP, Overlay, finished};
use super::delete::delete;
use super::foreground::{Signals, attend};
use super::terminal::Console;
use super::{Global, Status, UsageError};
use crate::container::config;
use crate::container::create::{self, Child, Options};

/// runc's options of `run`, and ours.
#[derive(Debug, Args)]
#[group(skip)]
#[command(after_help = OVERLAY_HELP)]
pub(crate) struct Run {
    #[command(flatten)]
    oci: liboci_cli::Run,
    #[command(flatten)]
    overlay: Overlay,
}

pub(super) fn run(global: &Global, args: &Run) -> anyhow::Result<Status> {
    let overlay = args.overlay.place();
    let args = &args.oci;
    let signals = Signals::hold()?;
    let options = Options {
        root: &global.root,
        again: None,
        id: &args.container_id,
        bundle: &args.bundle,
        console_socket: args.console_socket.as_deref(),
        pid_file: args.pid_file.as_deref(),
        preserve_fds: args.preserve_fds,
        no_pivot: args.no_pivot,
        no_new_keyring: args.no_new_keyring,
        is_deleted_at_end: !args.detach && !args.keep,
        overlay,
        mask: signals.before,
    };
    if args.detach {
        started(&options)?;
        return finished(global, &args.container_id, &signals);
    }
    if args.console_socket.is_some() {
        return Err(UsageError("--console-socket makes sense only with --detach".into()).into());
    }

    let console = if config::has_terminal(&args.bundle, &args.container_id)? {
        Some(Console::listen(&global.root)?)
    } else {
        None
    };
    let child = create::create(&Options {
        console_socket: console.as_ref().map(Console::path),
        ..options
    })?;
    let attended =
        started_in_foreground(&global.root, &args.container_id, &child, &signals, console);
    if args.keep && attended.is_ok() {
        return attended;
    }
    // With an error the program may run still.
    let deleted = delete(&global.root, &args.container_id, attended.is_err());
    let status = attended?;
    deleted?;
    Ok(status)
}

fn started_in_foreground(
    root: &Path,
    id: &str,
    child: &Child,
    signals: &Signals,
    console: Option<Console>,
) -> anyhow::Result<Status> {
    let terminal = console.map(Console::receive).transpose()?;
    create::start(root, id)?;
    attend(child, signals, terminal)
}

fn started(options: &Options<'_>) -> anyhow::Result<()> {
    create::create(options)?;
    create::start(options.root, options.id).inspect_err(|_| {
        // The reason of the failure matters more than one of the clean-up.
        let _ = delete(options.root, options.id, true);
    })?;
    Ok(())
}
