//! The keeper's operations on a real tree.

use std::time::UNIX_EPOCH;

use crate::engine::{self, Engine, RollbackOptions, Target};
use crate::keeper::Errand;
use crate::keeper::protocol::{CheckpointInfo, Failure};
use crate::keeper::server::Operations;
use crate::outcome::Report;

/// What attaches the engine to the errand's tree, on the thread that calls it.
pub fn attach(errand: &Errand) -> impl FnOnce() -> Result<Engine, Failure> + Send + 'static {
    let (pid, cgroup, label) = (
        errand.target.pid,
        errand.cgroup.clone(),
        errand.label.clone(),
    );
    move || Engine::attach(Target { pid, cgroup, label }).map_err(Failure::from)
}

impl From<engine::Error> for Failure {
    fn from(error: engine::Error) -> Failure {
        let message = error.to_string();
        match error {
            engine::Error::Refused(refusal) => Failure::Refused { refusal },
            engine::Error::Lost { .. } => Failure::Lost { message },
            _ => Failure::Error { message },
        }
    }
}

impl Operations for Engine {
    fn checkpoint(&mut self, name: &str) -> Result<Report, Failure> {
        Ok(self.take(name)?)
    }

    fn rollback(&mut self, name: &str, verify: bool) -> Result<Report, Failure> {
        Ok(Engine::rollback(self, name, RollbackOptions { verify })?)
    }

    fn checkpoints(&self) -> Vec<CheckpointInfo> {
        Engine::checkpoints(self).into_iter().map(info).collect()
    }

    fn release(&mut self, name: Option<&str>) -> Result<(), Failure> {
        Ok(Engine::release(self, name)?)
    }

    fn held(&self) -> usize {
        Engine::checkpoints(self).len()
    }

    fn is_alive(&self) -> bool {
        Engine::is_alive(self)
    }

    fn can_come_back(&self) -> bool {
        Engine::can_come_back(self)
    }

    fn root(&self) -> i32 {
        Engine::root(self)
    }

    fn collect_deaths(&mut self) {
        Engine::collect_deaths(self);
    }
}

fn info(info: engine::CheckpointInfo) -> CheckpointInfo {
    const PAGE: u64 = 4096;
    let since = info.taken_at.duration_since(UNIX_EPOCH).unwrap_or_default();
    let kinds = info.stats.by_kind.iter();
    CheckpointInfo {
        name: info.name,
        taken_at: since.as_secs_f64(),
        kinds: kinds
            .map(|(kind, stats)| (kind.name().to_owned(), stats.bytes))
            .collect(),
        header_bytes: info.stats.bytes,
        resident_bytes: info.resident_pages * PAGE,
        copied_bytes: info.shared_bytes,
    }
}
