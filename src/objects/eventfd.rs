//! eventfd(2).

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;

use nix::errno::Errno;
use serde::{Deserialize, Serialize};

use super::Error;
use super::fdinfo::Fdinfo;
use super::live::Live;
use crate::kernel::anonymous;

/// The count of an eventfd.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// What a read would return (with `EFD_SEMAPHORE`: how many reads would return 1).
    pub count: u64,
    /// `EFD_SEMAPHORE`.
    pub semaphore: bool,
}

/// Sets the count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Change {
    from: State,
    to: u64,
}

fn parse(info: &Fdinfo) -> Result<State, Error> {
    Ok(State {
        // Hexadecimal since it exists (fs/eventfd.c), whatever older manual pages say.
        count: info.hexadecimal("eventfd-count")?,
        semaphore: info.has("eventfd-semaphore") && info.number::<u8>("eventfd-semaphore")? != 0,
    })
}

/// Records or observes an eventfd.
pub fn capture(live: &Live<'_>) -> Result<State, Error> {
    parse(live.fdinfo()?)
}

impl State {
    /// What must change in `now`; `None` if it is another sort of eventfd.
    pub fn difference(&self, now: &Self) -> Option<Option<Change>> {
        if self.semaphore != now.semaphore {
            return None;
        }
        Some((self.count != now.count).then_some(Change {
            from: *now,
            to: self.count,
        }))
    }

    /// Makes one like it.
    pub fn make(&self) -> Result<OwnedFd, Error> {
        let fd = anonymous::eventfd(self.semaphore, true).map_err(|errno| Error::Own {
            call: "eventfd2",
            errno,
        })?;
        if self.count > 0 {
            File::from(fd.try_clone().map_err(own)?)
                .write_all(&self.count.to_ne_bytes())
                .map_err(own)?;
        }
        Ok(fd)
    }
}

fn own(error: std::io::Error) -> Error {
    Error::Own {
        call: "eventfd",
        errno: Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO)),
    }
}

impl Change {
    /// Sets the count. The tree is stopped, so a count that was more than 0 is read without blocking.
    pub fn apply(&self, duplicate: OwnedFd) -> Result<(), Error> {
        let mut file = File::from(duplicate);
        let mut read = [0; 8];
        let mut left = self.from.count;
        while left > self.to || (!self.from.semaphore && left > 0) {
            file.read_exact(&mut read).map_err(own)?;
            left -= u64::from_ne_bytes(read).min(left);
        }
        if self.to > left {
            file.write_all(&(self.to - left).to_ne_bytes())
                .map_err(own)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use super::*;

    fn now(fd: &OwnedFd) -> State {
        parse(&Fdinfo::read(std::process::id() as i32, fd.as_raw_fd()).unwrap()).unwrap()
    }

    #[test]
    fn any_count_becomes_any_other() {
        for semaphore in [false, true] {
            for (from, to) in [(0, 0), (0, 25), (25, 0), (3, 300), (300, 3), (7, 7)] {
                let recorded = State {
                    count: to,
                    semaphore,
                };
                let fd = State {
                    count: from,
                    semaphore,
                }
                .make()
                .unwrap();
                assert_eq!(
                    now(&fd),
                    State {
                        count: from,
                        semaphore
                    }
                );
                if let Some(change) = recorded.difference(&now(&fd)).unwrap() {
                    change.apply(fd.try_clone().unwrap()).unwrap();
                }
                assert_eq!(now(&fd), recorded);
            }
        }
    }

    #[test]
    fn a_semaphore_is_no_counter() {
        let counter = State {
            count: 1,
            semaphore: false,
        };
        assert_eq!(
            counter.difference(&State {
                count: 1,
                semaphore: true
            }),
            None
        );
    }
}
