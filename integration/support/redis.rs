//! A client of Redis, as small as the tests need it: requests and replies of RESP2.

use std::io::{BufRead, BufReader, Error, ErrorKind, Read, Result, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use super::wait;

/// What every Redis of the tests is started with, besides where it listens.
pub(crate) const OPTIONS: &[&str] = &[
    "--save",
    "",
    "--appendonly",
    "no",
    "--enable-debug-command",
    "yes",
    "--daemonize",
    "no",
];

/// A connection.
#[derive(Debug)]
pub(crate) struct Client {
    stream: BufReader<UnixStream>,
}

impl Client {
    /// Connects to a socket in the file system.
    pub(crate) fn connect(socket: &Path) -> Result<Self> {
        let stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(Duration::from_secs(300)))?;
        Ok(Self {
            stream: BufReader::new(stream),
        })
    }

    /// Waits until a server answers there.
    #[track_caller]
    pub(crate) fn wait_for(socket: &Path) -> Self {
        let mut client = None;
        wait::until("Redis answers", || {
            client = Self::connect(socket).ok();
            client
                .as_mut()
                .is_some_and(|client| client.ask("PING").is_ok_and(|reply| reply == "PONG"))
        });
        client.expect("connected")
    }

    /// Sends a command, its words separated by spaces; the reply as text, the elements of an array one per line.
    ///
    /// # Errors
    ///
    /// The connection's, and `Other` for an error reply.
    pub(crate) fn ask(&mut self, command: &str) -> Result<String> {
        let words: Vec<&str> = command.split(' ').collect();
        let mut request = format!("*{}\r\n", words.len());
        for word in words {
            request.push_str(&format!("${}\r\n{word}\r\n", word.len()));
        }
        self.stream.get_mut().write_all(request.as_bytes())?;
        self.reply()
    }

    /// Like `ask`, where nothing may go wrong.
    #[track_caller]
    pub(crate) fn must(&mut self, command: &str) -> String {
        self.ask(command)
            .unwrap_or_else(|error| panic!("{command}: {error}"))
    }

    fn reply(&mut self) -> Result<String> {
        let mut line = String::new();
        if self.stream.read_line(&mut line)? == 0 {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        let line = line.trim_end();
        let (kind, rest) = line.split_at_checked(1).ok_or(ErrorKind::InvalidData)?;
        let count = || {
            rest.parse::<i64>()
                .map_err(|_| Error::from(ErrorKind::InvalidData))
        };
        match kind {
            "+" | ":" => Ok(rest.to_owned()),
            "-" => Err(Error::other(rest.to_owned())),
            "$" => {
                let Ok(length) = usize::try_from(count()?) else {
                    return Ok("(nil)".to_owned());
                };
                let mut bytes = vec![0; length + 2];
                self.stream.read_exact(&mut bytes)?;
                bytes.truncate(length);
                Ok(String::from_utf8_lossy(&bytes).into_owned())
            }
            "*" => {
                let elements: Result<Vec<String>> = (0..count()?).map(|_| self.reply()).collect();
                Ok(elements?.join("\n"))
            }
            _ => Err(ErrorKind::InvalidData.into()),
        }
    }
}

/// Has Redis hold about 100 MB; the digest of it.
#[track_caller]
pub(crate) fn fill(client: &mut Client) -> String {
    client.must("DEBUG POPULATE 90000 key 1000");
    client.must("HSET hash a 1 b 2 c 3");
    client.must("RPUSH list x y z");
    client.must("CONFIG SET maxmemory 1gb");
    client.must("DEBUG DIGEST")
}

/// `redis-server` listening on a socket in this directory, to be started by whoever.
pub(crate) fn server(socket: &Path) -> Command {
    let mut command = Command::new("redis-server");
    command
        .args(["--port", "0", "--unixsocket"])
        .arg(socket)
        .args(OPTIONS);
    command.current_dir(socket.parent().expect("a directory"));
    command
}
