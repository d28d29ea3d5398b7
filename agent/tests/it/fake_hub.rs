//! A hub that answers an agent from a script, over real sockets, and remembers what it was told.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex, mpsc};

use serde_json::{Value, json};

/// A call that the hub received.
#[derive(Clone, Debug)]
pub(crate) struct Call {
    /// Method and path.
    pub(crate) what: String,
    pub(crate) authorization: String,
    pub(crate) body: Value,
}

/// Answers a call with a status and a body.
type Script = Box<dyn Fn(&Call) -> (u16, Value) + Send>;

/// The hub. Its thread ends with the process.
pub(crate) struct FakeHub {
    pub(crate) url: String,
    calls: Arc<Mutex<Vec<Call>>>,
    heard: mpsc::Receiver<String>,
}

impl FakeHub {
    pub(crate) fn start(script: Script) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let calls = Arc::new(Mutex::new(Vec::new()));
        let (tell, heard) = mpsc::channel();
        let remembered = Arc::clone(&calls);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let Some(call) = answer(stream.unwrap(), &script) else { continue };
                remembered.lock().unwrap().push(call.clone());
                if tell.send(call.what).is_err() {
                    return;
                }
            }
        });
        Self { url, calls, heard }
    }

    pub(crate) fn calls(&self) -> Vec<Call> {
        self.calls.lock().unwrap().clone()
    }

    /// Waits until a call whose description ends like this was answered.
    pub(crate) fn wait_for(&self, end: &str) {
        while !self.heard.recv().unwrap().ends_with(end) {}
    }
}

fn answer(stream: TcpStream, script: &Script) -> Option<Call> {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let mut line = String::new();
    reader.read_line(&mut line).unwrap();
    let what = line.trim_end().strip_suffix(" HTTP/1.1")?.to_owned();
    let (mut length, mut authorization) = (0, String::new());
    loop {
        line.clear();
        reader.read_line(&mut line).unwrap();
        let Some((name, value)) = line.trim_end().split_once(": ") else { break };
        match name.to_ascii_lowercase().as_str() {
            "content-length" => length = value.parse().unwrap(),
            "authorization" => authorization = value.to_owned(),
            _ => {}
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).unwrap();
    let body = serde_json::from_slice(&body).unwrap_or(Value::Null);
    let call = Call { what, authorization, body };
    let (status, body) = script(&call);
    let body = body.to_string();
    let mut stream = stream;
    // A peer that hung up meanwhile is part of some tests.
    let _ = write!(
        stream,
        "HTTP/1.1 {status} Said\r\ncontent-type: application/json\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}",
        body.len()
    );
    Some(call)
}

/// A problem as hubs tell it.
pub(crate) fn problem(status: u16, detail: &str) -> (u16, Value) {
    (status, json!({"type": "about:blank", "title": "No", "status": status, "detail": detail}))
}
