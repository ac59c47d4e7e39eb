//! Keeping idle processors from sleeping deeply: `/dev/cpu_dma_latency` (`Documentation/power/pm_qos_interface.rst`).
//!
//! A task that is woken on a processor that sleeps has to wait until that has woken up: some 40 us in a virtual machine that
//! halts, up to 100 or more from the deep states of a bare one. Whoever stops a task and hands it work a few times within a
//! millisecond waits for that each time.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::sync::Arc;

/// The device by which a process tells what it can bear.
pub const DEVICE: &str = "/dev/cpu_dma_latency";

/// No wish, as the kernel has it (`PM_QOS_CPU_LATENCY_DEFAULT_VALUE`).
const ANY: i32 = 2000 * 1_000_000;

/// A wish for processors that wake up quickly, which can be made again and again. It ends with its process.
#[derive(Debug, Clone)]
pub struct Latency(Option<Arc<File>>);

impl Latency {
    /// Wishes nothing yet. Without the device, or the privilege to open it, nothing is ever wished.
    pub fn open() -> Self {
        let opened = OpenOptions::new().write(true).open(DEVICE);
        Self(opened.ok().map(Arc::new))
    }

    /// Keeps idle processors awake until the guard is dropped.
    pub fn awake(&self) -> Awake {
        self.wish(0);
        Awake(self.clone())
    }

    fn wish(&self, microseconds: i32) {
        if let Some(file) = &self.0
            && let Err(error) = (&**file).write_all(&microseconds.to_ne_bytes())
        {
            tracing::debug!(%error, "{DEVICE}");
        }
    }
}

/// While it lives, idle processors poll for work instead of sleeping.
#[derive(Debug)]
pub struct Awake(Latency);

impl Drop for Awake {
    fn drop(&mut self) {
        self.0.wish(ANY);
    }
}
