//! A file that is written on another thread, while this one makes what comes next.

use std::fs::File;
use std::io::{self, Write};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::{self, JoinHandle};

/// Buffers on their way.
const DEPTH: usize = 8;

/// Writes to a file behind the back of its owner. An error is told by a later write, or at the end by [`Write::flush`].
#[derive(Debug)]
pub(super) struct WriteBehind {
    /// `None` once no more is taken.
    full: Option<SyncSender<Vec<u8>>>,
    empty: Receiver<Vec<u8>>,
    thread: Option<JoinHandle<io::Result<()>>>,
}

impl WriteBehind {
    /// Starts the thread.
    pub(super) fn start(file: File) -> io::Result<Self> {
        let (full, filled) = sync_channel::<Vec<u8>>(DEPTH);
        let (emptied, empty) = sync_channel(DEPTH + 2);
        let work = move || {
            let mut file = file;
            for mut buffer in filled {
                file.write_all(&buffer)?;
                buffer.clear();
                // One more than there is room for is not kept.
                let _ = emptied.try_send(buffer);
            }
            Ok(())
        };
        let thread = thread::Builder::new().name("write".into()).spawn(work)?;
        Ok(Self {
            full: Some(full),
            empty,
            thread: Some(thread),
        })
    }

    /// Waits until all is written.
    fn end(&mut self) -> io::Result<()> {
        drop(self.full.take());
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(ended)) => ended,
            Some(Err(_)) => Err(io::Error::other("the thread that writes has died")),
            None => Ok(()),
        }
    }
}

impl Write for WriteBehind {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut buffer = self.empty.try_recv().unwrap_or_default();
        buffer.extend_from_slice(bytes);
        let sent = self.full.as_ref().map(|full| full.send(buffer));
        match sent {
            Some(Ok(())) => Ok(bytes.len()),
            // It has ended, of an error.
            Some(Err(_)) => Err(self
                .end()
                .err()
                .unwrap_or_else(|| io::Error::other("the thread that writes has ended"))),
            None => Err(io::Error::other("it was ended")),
        }
    }

    /// Waits until all is written; nothing can be written after that.
    fn flush(&mut self) -> io::Result<()> {
        self.end()
    }
}

impl Drop for WriteBehind {
    fn drop(&mut self) {
        // Who cares about errors has flushed.
        let _ = self.end();
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Seek};

    use super::*;

    #[test]
    fn all_is_written_in_order() {
        let mut file = tempfile::tempfile().unwrap();
        let mut behind = WriteBehind::start(file.try_clone().unwrap()).unwrap();
        let mut expected = Vec::new();
        for number in 0..1000u32 {
            let bytes = vec![number as u8; number as usize % 97];
            behind.write_all(&bytes).unwrap();
            expected.extend_from_slice(&bytes);
        }
        behind.flush().unwrap();
        assert!(behind.write(b"more").is_err());
        let mut found = Vec::new();
        file.rewind().unwrap();
        file.read_to_end(&mut found).unwrap();
        assert!(found == expected);
    }

    #[test]
    fn an_error_is_told() {
        let full = || File::options().write(true).open("/dev/full").unwrap();
        let mut behind = WriteBehind::start(full()).unwrap();
        behind.write_all(b"x").unwrap();
        let error = behind.flush().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
        let mut behind = WriteBehind::start(full()).unwrap();
        let error = loop {
            if let Err(error) = behind.write_all(b"x") {
                break error;
            }
        };
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
    }
}
