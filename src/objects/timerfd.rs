//! timerfd_create(2). Time goes on: a timer gets back what was left of it at the checkpoint.

use std::os::fd::OwnedFd;

use nix::errno::Errno;
use serde::{Deserialize, Serialize};

use super::Error;
use super::fdinfo::Fdinfo;
use super::live::Live;
use crate::kernel::anonymous;

/// A timer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// Its clock (`CLOCK_*`).
    pub clock: i32,
    /// Expirations not read yet.
    pub ticks: u64,
    /// The flags it was set with (`TFD_TIMER_*`).
    pub flags: i32,
    /// What is left until the next expiration, seconds and nanoseconds; (0, 0) if none is to come.
    pub left: (u64, u64),
    /// The interval between later ones; (0, 0) if there are none.
    pub interval: (u64, u64),
}

/// Sets the timer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Change(State);

fn parse(info: &Fdinfo) -> Result<State, Error> {
    Ok(State {
        clock: info.number("clockid")?,
        ticks: info.number("ticks")?,
        flags: info.octal("settime flags")? as i32,
        left: info.pair("it_value")?,
        interval: info.pair("it_interval")?,
    })
}

/// Records or observes a timerfd.
pub fn capture(live: &Live<'_>) -> Result<State, Error> {
    parse(live.fdinfo()?)
}

impl State {
    /// Whether an expiration is to come. One with an interval always has one, even if what is left reads as 0.
    pub fn is_armed(&self) -> bool {
        self.left != (0, 0) || (self.interval != (0, 0) && self.ticks == 0)
    }

    /// What must change in `now`; `None` if it runs by another clock. An armed timer has always gone on.
    pub fn difference(&self, now: &Self) -> Option<Option<Change>> {
        if self.clock != now.clock {
            return None;
        }
        Some((self != now || self.is_armed()).then_some(Change(*self)))
    }

    /// Makes one like it.
    pub fn make(&self) -> Result<OwnedFd, Error> {
        let fd = anonymous::timerfd(self.clock).map_err(own("timerfd_create"))?;
        Change(*self).apply(&fd)?;
        Ok(fd)
    }

    /// How `now`, looked at a moment after it was set, differs from what was set, in words.
    pub fn compare(&self, now: &Self) -> Vec<String> {
        let mut differences = Vec::new();
        if (self.clock, self.flags, self.interval) != (now.clock, now.flags, now.interval) {
            differences.push(format!("timer settings {now:?} instead of {self:?}"));
        }
        let expired = now.ticks > self.ticks;
        if now.ticks < self.ticks || (expired && !self.is_armed()) {
            differences.push(format!("{} ticks instead of {}", now.ticks, self.ticks));
        }
        if !expired && (now.left > self.left || now.is_armed() != self.is_armed()) {
            differences.push(format!("{:?} left instead of {:?}", now.left, self.left));
        }
        differences
    }
}

fn own(call: &'static str) -> impl Fn(Errno) -> Error {
    move |errno| Error::Own { call, errno }
}

fn signed((seconds, nanoseconds): (u64, u64)) -> (i64, i64) {
    (seconds as i64, nanoseconds as i64)
}

impl Change {
    /// Sets the timer.
    pub fn apply(&self, fd: impl std::os::fd::AsFd) -> Result<(), Error> {
        let state = self.0;
        let mut left = signed(state.left);
        if state.is_armed() {
            if left == (0, 0) {
                left = (0, 1);
            }
            if state.flags & libc::TFD_TIMER_ABSTIME != 0 {
                let now = anonymous::clock(state.clock).map_err(own("clock_gettime"))?;
                let nanoseconds = now.1 + left.1;
                left = (
                    now.0 + left.0 + nanoseconds / 1_000_000_000,
                    nanoseconds % 1_000_000_000,
                );
            }
        }
        anonymous::set_timerfd(&fd, state.flags, left, signed(state.interval))
            .map_err(own("timerfd_settime"))?;
        if state.ticks > 0 {
            anonymous::set_timerfd_ticks(&fd, state.ticks).map_err(own("TFD_IOC_SET_TICKS"))?;
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
    fn a_timer_gets_back_what_was_left() {
        let disarmed = State {
            clock: libc::CLOCK_MONOTONIC,
            ticks: 0,
            flags: 0,
            left: (0, 0),
            interval: (0, 0),
        };
        let expired = State {
            ticks: 1,
            ..disarmed
        };
        let armed = State {
            left: (50, 7),
            interval: (3, 0),
            ticks: 4,
            ..disarmed
        };
        let absolute = State {
            clock: libc::CLOCK_REALTIME,
            flags: libc::TFD_TIMER_ABSTIME | libc::TFD_TIMER_CANCEL_ON_SET,
            left: (9, 0),
            ..disarmed
        };
        for recorded in [disarmed, expired, armed, absolute] {
            let fd = recorded.make().unwrap();
            assert_eq!(recorded.compare(&now(&fd)), Vec::<String>::new());
            let other = State {
                left: (1000, 0),
                ..recorded
            };
            Change(other).apply(&fd).unwrap();
            assert_ne!(
                recorded.compare(&now(&fd)),
                Vec::<String>::new(),
                "{recorded:?}"
            );
            if let Some(change) = recorded.difference(&now(&fd)).unwrap() {
                change.apply(&fd).unwrap();
            }
            assert_eq!(recorded.compare(&now(&fd)), Vec::<String>::new());
        }
    }
}
