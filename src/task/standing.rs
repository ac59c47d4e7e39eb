//! What a shadow has of its process besides memory, and what a process made from it begins with.

use std::collections::BTreeMap;

use nix::unistd::Pid;
use zerocopy::IntoBytes;

use crate::record::Context;

use super::Result;
use super::recorded::{Recorded, Renamed};

/// Of all processes of a context that is being filled: state that can't be given to another, or is taken from the shadow.
#[derive(Debug, Default)]
pub struct Standing(BTreeMap<Pid, Vec<u8>>);

impl Standing {
    /// Reads it from the records of processes and threads.
    ///
    /// # Errors
    ///
    /// They are not complete.
    pub fn read(context: &Context) -> Result<Self> {
        let recorded = Recorded::read(context, &Renamed::default())?;
        let mut all = BTreeMap::new();
        for process in recorded.processes() {
            let identity = &process.identity;
            let mut bytes = Vec::new();
            for number in [identity.session, identity.terminal] {
                bytes.extend(number.to_ne_bytes());
            }
            bytes.extend(process.record.state.as_bytes());
            bytes.extend(process.rights.as_bytes());
            if let Some(leader) = process.threads.get(&process.pid()) {
                bytes.extend(leader.record.namespaces.as_bytes());
                bytes.extend(leader.record.state.rights.as_bytes());
            }
            all.insert(process.pid(), bytes);
        }
        Ok(Self(all))
    }

    /// That of a process; two that are equal can have the same shadow.
    pub fn of(&self, pid: Pid) -> &[u8] {
        self.0.get(&pid).map_or(&[], Vec::as_slice)
    }
}
