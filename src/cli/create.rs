//! `create`: set a container up, its program waiting for `start`.

use anyhow::Context;
use nix::sys::signal::SigSet;

use super::{Global, Status};
use crate::container::create::{self, Options};

pub(super) fn run(global: &Global, args: &liboci_cli::Create) -> anyhow::Result<Status> {
    create::create(&Options {
        root: &global.root,
        id: &args.container_id,
        bundle: &args.bundle,
        console_socket: args.console_socket.as_deref(),
        pid_file: args.pid_file.as_deref(),
        preserve_fds: args.preserve_fds,
        no_pivot: args.no_pivot,
        no_new_keyring: args.no_new_keyring,
        mask: SigSet::thread_get_mask().context("reading the signal mask")?,
    })?;
    Ok(Status::Done)
}
