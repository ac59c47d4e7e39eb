//! Unix sockets that a process of the tree makes itself, in a batch: who makes or connects one, or listens, is what
//! `SO_PEERCRED` tells its peer (unix(7)).

use std::collections::BTreeMap;
use std::os::fd::{BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::unistd::Pid;

use super::live::Holder;
use super::transfer::{self, Passage};
use super::{Error, survey};
use crate::freeze::{Batch, Stopped};
use crate::kernel::socket::{self, Address};

/// Makes unix sockets on behalf of a process.
pub trait Maker {
    /// Whether it can do so for this process.
    fn reaches(&self, pid: i32) -> bool;

    /// Two connected sockets.
    ///
    /// # Errors
    /// As socketpair(2).
    fn pair(&mut self, pid: i32, kind: i32) -> Result<(OwnedFd, OwnedFd), Error>;

    /// A socket connected to a listener.
    ///
    /// # Errors
    /// As connect(2).
    fn connected(&mut self, pid: i32, kind: i32, to: &Address) -> Result<OwnedFd, Error>;

    /// Lets a bound socket of ours listen.
    ///
    /// # Errors
    /// As listen(2).
    fn listen(&mut self, pid: i32, socket: BorrowedFd<'_>, backlog: u32) -> Result<(), Error>;
}

/// The processes of a stopped tree.
#[derive(Debug)]
pub struct Inside<'a, 't> {
    /// The tree.
    pub stopped: &'a mut Stopped<'t>,
    /// Its processes.
    pub holders: &'a BTreeMap<i32, Holder>,
}

impl Inside<'_, '_> {
    /// Runs a batch that leaves descriptors behind, takes duplicates of them and has the originals closed.
    fn made(
        &mut self,
        pid: i32,
        batch: &Batch,
        call: &'static str,
        numbers: impl FnOnce(&crate::freeze::Outputs) -> Result<Vec<i32>, Errno>,
    ) -> Result<Vec<OwnedFd>, Error> {
        let failed = |errno| Error::Descriptor {
            what: "unix socket".into(),
            pid,
            call,
            errno,
        };
        let outputs = self.stopped.run(Pid::from_raw(pid), batch)?;
        let numbers = numbers(&outputs).map_err(failed)?;
        let holder = self.holders.get(&pid).ok_or_else(|| failed(Errno::ESRCH))?;
        let duplicates = numbers.iter().map(|&fd| holder.duplicate(fd)).collect();
        let mut close = Batch::new();
        for fd in numbers {
            close.call(libc::SYS_close, &[fd.into()]);
        }
        self.stopped.run(Pid::from_raw(pid), &close)?;
        duplicates
    }
}

impl Maker for Inside<'_, '_> {
    fn reaches(&self, pid: i32) -> bool {
        self.holders.contains_key(&pid)
    }

    fn pair(&mut self, pid: i32, kind: i32) -> Result<(OwnedFd, OwnedFd), Error> {
        let mut batch = Batch::new();
        let numbers = batch.output(8);
        let kind = kind | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
        let step = batch.call(
            libc::SYS_socketpair,
            &[libc::AF_UNIX.into(), kind.into(), 0.into(), numbers.arg()],
        );
        let made = self.made(pid, &batch, "socketpair", |outputs| {
            outputs.result(step)?;
            let bytes = outputs.bytes(&numbers);
            let number = |at: usize| {
                bytes[at..]
                    .first_chunk()
                    .map_or(-1, |bytes| i32::from_ne_bytes(*bytes))
            };
            Ok(vec![number(0), number(4)])
        })?;
        let [one, two] = <[OwnedFd; 2]>::try_from(made).map_err(|_| Error::Own {
            call: "socketpair",
            errno: Errno::EBADF,
        })?;
        Ok((one, two))
    }

    fn connected(&mut self, pid: i32, kind: i32, to: &Address) -> Result<OwnedFd, Error> {
        let mut batch = Batch::new();
        let address = batch.input(&to.0);
        let kind = kind | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
        let socket = batch.call(
            libc::SYS_socket,
            &[libc::AF_UNIX.into(), kind.into(), 0.into()],
        );
        batch.must_succeed(socket);
        let connect = batch.call(
            libc::SYS_connect,
            &[socket.into(), address, to.0.len().into()],
        );
        let mut failed = Ok(());
        let made = self.made(pid, &batch, "socket", |outputs| {
            failed = outputs.result(connect).map(drop);
            Ok(vec![outputs.result(socket)? as i32])
        })?;
        failed.map_err(|errno| Error::Descriptor {
            what: "unix socket".into(),
            pid,
            call: "connect",
            errno,
        })?;
        made.into_iter().next().ok_or(Error::Own {
            call: "socket",
            errno: Errno::EBADF,
        })
    }

    fn listen(&mut self, pid: i32, socket: BorrowedFd<'_>, backlog: u32) -> Result<(), Error> {
        let run = |inside: &mut Self, batch: &Batch| {
            let outputs = inside.stopped.run(Pid::from_raw(pid), batch)?;
            match outputs.first_failure() {
                None => Ok(outputs),
                Some((step, errno)) => Err(transfer::failed(pid, step, errno)),
            }
        };
        let mut batch = Batch::new();
        let passage = Passage::open(&mut batch);
        let outputs = run(self, &batch)?;
        let holder = self.holders.get(&pid).ok_or(Error::Own {
            call: "finding a process",
            errno: Errno::ESRCH,
        })?;
        let landing = passage.send(&outputs, holder, &[socket])?;
        // It arrives at the lowest free number and is moved to the next.
        let open = survey::numbers(pid)?;
        let number = (0..)
            .filter(|fd| open.binary_search(fd).is_err())
            .nth(1)
            .unwrap_or(-1);
        let mut batch = Batch::new();
        landing.receive(&mut batch, number);
        batch.call(libc::SYS_listen, &[number.into(), backlog.into()]);
        batch.call(libc::SYS_close, &[number.into()]);
        landing.close(&mut batch);
        run(self, &batch).map(drop)
    }
}

/// The keeper itself, where nobody asks for credentials.
#[derive(Debug)]
pub struct Keeper;

impl Maker for Keeper {
    fn reaches(&self, _pid: i32) -> bool {
        false
    }

    fn pair(&mut self, pid: i32, kind: i32) -> Result<(OwnedFd, OwnedFd), Error> {
        let failed = |call| move |errno| Error::Own { call, errno };
        socket::as_seen_by(pid, || socket::pair(kind))
            .map_err(failed("entering the process's namespaces"))?
            .map_err(failed("socketpair"))
    }

    fn listen(&mut self, _pid: i32, socket: BorrowedFd<'_>, backlog: u32) -> Result<(), Error> {
        socket::listen(socket, backlog as i32).map_err(|errno| Error::Own {
            call: "listen",
            errno,
        })
    }

    fn connected(&mut self, pid: i32, kind: i32, to: &Address) -> Result<OwnedFd, Error> {
        let failed = |call| move |errno| Error::Own { call, errno };
        let made = socket::create(libc::AF_UNIX, kind, 0).map_err(failed("socket"))?;
        socket::as_seen_by(pid, || socket::connect(std::os::fd::AsFd::as_fd(&made), to))
            .map_err(failed("entering the process's namespaces"))?
            .map_err(failed("connect"))?;
        Ok(made)
    }
}
