//! `create`: set a container up, its program waiting for `start`.

use super::foreground::Signals;
use super::{Global, Status};
use crate::container::create::{self, Options};
use crate::container::lifecycle;

pub(super) fn run(global: &Global, args: &liboci_cli::Create) -> anyhow::Result<Status> {
    let signals = Signals::hold()?;
    create::create(&Options {
        root: &global.root,
        id: &args.container_id,
        bundle: &args.bundle,
        console_socket: args.console_socket.as_deref(),
        pid_file: args.pid_file.as_deref(),
        preserve_fds: args.preserve_fds,
        no_pivot: args.no_pivot,
        no_new_keyring: args.no_new_keyring,
        mask: signals.before,
    })?;
    finished(global, &args.container_id, &signals)
}

/// The end of a command that leaves a container behind: none if it was told to stop meanwhile.
pub(super) fn finished(global: &Global, id: &str, signals: &Signals) -> anyhow::Result<Status> {
    match signals.interruption()? {
        Some(signal) => {
            lifecycle::delete(&global.root, id, true)?;
            Ok(Status::Program(128 + signal as u8))
        }
        None => Ok(Status::Done),
    }
}
