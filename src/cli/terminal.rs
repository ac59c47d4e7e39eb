//! The terminal of a program in the foreground: ours stands for the container's.

use std::fs;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use anyhow::Context;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags};
use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};

use crate::kernel::terminal;

/// A socket on which the container's process hands its terminal over.
#[derive(Debug)]
pub(super) struct Console {
    listener: UnixListener,
    path: PathBuf,
}

impl Console {
    /// Listens below the directory of the containers' states.
    pub(super) fn listen(root: &Path) -> anyhow::Result<Console> {
        fs::create_dir_all(root).with_context(|| format!("creating {}", root.display()))?;
        let path = root.join(format!(".console-{}", std::process::id()));
        // Left by a process that had our PID.
        let _ = fs::remove_file(&path);
        let listener = UnixListener::bind(&path)
            .with_context(|| format!("listening on {}", path.display()))?;
        Ok(Console { listener, path })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Takes the terminal that a process, started with our path, has sent.
    pub(super) fn receive(self) -> anyhow::Result<Terminal> {
        let (connection, _) = self
            .listener
            .accept()
            .context("waiting for the container's terminal")?;
        let master = terminal::receive_descriptor(connection.as_fd())
            .context("receiving the container's terminal")?;
        Terminal::new(master)
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        // A left-over socket is removed by the next command with this PID.
        let _ = fs::remove_file(&self.path);
    }
}

/// The container's terminal, connected to our standard input and output; ours is raw meanwhile.
#[derive(Debug)]
pub(super) struct Terminal {
    master: OwnedFd,
    /// Input that the container has not taken yet.
    input: Vec<u8>,
    input_open: bool,
    output_open: bool,
    /// How our terminal was set, if our input is one.
    before: Option<Termios>,
    stdin: io::Stdin,
}

impl Terminal {
    fn new(master: OwnedFd) -> anyhow::Result<Terminal> {
        let flags = OFlag::from_bits_retain(fcntl(master.as_raw_fd(), FcntlArg::F_GETFL)?);
        fcntl(
            master.as_raw_fd(),
            FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK),
        )
        .context("setting O_NONBLOCK")?;
        let stdin = io::stdin();
        let before = tcgetattr(&stdin).ok();
        if let Some(before) = &before {
            let mut raw = before.clone();
            cfmakeraw(&mut raw);
            tcsetattr(&stdin, SetArg::TCSANOW, &raw).context("setting our terminal raw")?;
        }
        let terminal = Terminal {
            master,
            input: Vec::new(),
            input_open: true,
            output_open: true,
            before,
            stdin,
        };
        terminal.resize();
        Ok(terminal)
    }

    /// Gives the container's terminal the size of ours, if ours is one.
    pub(super) fn resize(&self) {
        let _ = terminal::copy_window_size(self.stdin.as_fd(), self.master.as_fd());
    }

    /// What has to be waited for: the container's terminal, then our input.
    pub(super) fn watched(&self) -> Vec<PollFd<'_>> {
        let mut master = PollFlags::empty();
        master.set(PollFlags::POLLIN, self.output_open);
        master.set(PollFlags::POLLOUT, !self.input.is_empty());
        let mut watched = Vec::new();
        if self.output_open {
            watched.push(PollFd::new(self.master.as_fd(), master));
            if self.input_open && self.input.is_empty() {
                watched.push(PollFd::new(self.stdin.as_fd(), PollFlags::POLLIN));
            }
        }
        watched
    }

    /// Moves what is there to be moved, with the results of waiting for [`Terminal::watched`].
    pub(super) fn transfer(&mut self, ready: &[PollFlags]) -> anyhow::Result<()> {
        if ready.first().is_some_and(|master| !master.is_empty()) {
            self.show()?;
            self.feed()?;
        }
        if ready.get(1).is_some_and(|input| !input.is_empty()) {
            let mut buffer = [0; 4096];
            match nix::unistd::read(self.stdin.as_raw_fd(), &mut buffer) {
                Ok(0) => self.input_open = false,
                Ok(read) => self.input.extend_from_slice(&buffer[..read]),
                Err(Errno::EINTR | Errno::EAGAIN) => (),
                Err(_) => self.input_open = false,
            }
            self.feed()?;
        }
        Ok(())
    }

    /// Shows what the program has written until its end.
    pub(super) fn finish(&mut self) -> anyhow::Result<()> {
        self.show()
    }

    fn show(&mut self) -> anyhow::Result<()> {
        let mut buffer = [0; 4096];
        while self.output_open {
            match nix::unistd::read(self.master.as_raw_fd(), &mut buffer) {
                // EIO: no process has the other end open any more.
                Ok(0) | Err(Errno::EIO) => self.output_open = false,
                Ok(read) => {
                    let mut out = io::stdout().lock();
                    // A reader of ours that went away does not stop the program.
                    let _ = out.write_all(&buffer[..read]).and_then(|()| out.flush());
                }
                Err(Errno::EAGAIN) => break,
                Err(Errno::EINTR) => (),
                Err(error) => return Err(error).context("reading the container's terminal"),
            }
        }
        Ok(())
    }

    fn feed(&mut self) -> anyhow::Result<()> {
        while !self.input.is_empty() {
            match nix::unistd::write(&self.master, &self.input) {
                Ok(written) => drop(self.input.drain(..written)),
                Err(Errno::EAGAIN) => break,
                Err(Errno::EINTR) => (),
                Err(Errno::EIO) => self.input.clear(),
                Err(error) => return Err(error).context("writing to the container's terminal"),
            }
        }
        Ok(())
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        if let Some(before) = &self.before {
            // Nothing more can be done about a terminal that has gone.
            let _ = tcsetattr(&self.stdin, SetArg::TCSANOW, before);
        }
    }
}
