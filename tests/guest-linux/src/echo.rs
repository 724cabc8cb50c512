//! TCP port 7000 sends back what it gets.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::thread;

use anyhow::{Context, Result};

const PORT: u16 = 7000;
const BUFFER: usize = 64 << 10;

/// Starts to listen; each connection gets a thread.
pub fn serve() -> Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT))
        .with_context(|| format!("TCP port {PORT} cannot be opened, does something else use it?"))?;
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            // Out of threads: the connection is closed, the next one may do better.
            let _ = thread::Builder::new().stack_size(128 << 10).spawn(move || echo(stream));
        }
    });
    Ok(())
}

/// Ends with the connection, whatever ended that.
fn echo(mut stream: TcpStream) {
    let _ = stream.set_nodelay(true);
    let mut buffer = vec![0; BUFFER];
    while let Ok(length @ 1..) = stream.read(&mut buffer) {
        if stream.write_all(&buffer[..length]).is_err() {
            return;
        }
    }
}
