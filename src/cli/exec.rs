//! `exec`: run another program in a running container.

use super::foreground::{Signals, attend};
use super::terminal::Console;
use super::{Global, Status, UsageError, output};
use crate::container::children;
use crate::container::exec::{Options, Prepared};

/// runc's exit status when the program could not be started, out of the way of what programs return.
const NOT_STARTED: Status = Status::Program(255);

pub(super) fn run(global: &Global, args: &liboci_cli::Exec) -> anyhow::Result<Status> {
    if args.process.is_none() && args.command.is_empty() {
        return Err(UsageError("exec needs a command or --process FILE".into()).into());
    }
    start(global, args).or_else(|error| {
        output::error(global, &error.context("exec failed"));
        Ok(NOT_STARTED)
    })
}

fn start(global: &Global, args: &liboci_cli::Exec) -> anyhow::Result<Status> {
    let signals = Signals::hold()?;
    let options = Options {
        root: &global.root,
        id: &args.container_id,
        process: args.process.as_deref(),
        args: &args.command,
        env: args
            .env
            .iter()
            .map(|(name, value)| format!("{name}={value}"))
            .collect(),
        cwd: args.cwd.as_deref(),
        user: args.user,
        additional_gids: &args.additional_gids,
        capabilities: &args.cap,
        no_new_privileges: args.no_new_privs,
        apparmor: args.apparmor.as_deref(),
        terminal: args.tty,
        console_socket: args.console_socket.as_deref(),
        pid_file: args.pid_file.as_deref(),
        preserve_fds: args.preserve_fds,
        ignore_paused: args.ignore_paused,
        cgroup: args.cgroup.as_deref(),
        mask: signals.before,
    };
    if args.detach {
        Prepared::new(options)?.start()?;
        return match signals.interruption()? {
            Some(signal) => {
                children::abandon();
                Ok(Status::Program(128 + signal as u8))
            }
            None => Ok(Status::Done),
        };
    }
    let prepared = Prepared::new(options)?;
    let console = match (prepared.has_terminal(), &args.console_socket) {
        (true, None) => Some(Console::listen(&global.root)?),
        _ => None,
    };
    let child = match &console {
        Some(console) => prepared.with_console_socket(console.path()).start()?,
        None => prepared.start()?,
    };
    let terminal = console.map(Console::receive).transpose()?;
    attend(&child, &signals, terminal)
}
