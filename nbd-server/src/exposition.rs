//! A listener that tells the numbers of a server over HTTP. What they are is told in `metrics`.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{ALLOW, CONTENT_TYPE, HeaderValue};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use parking_lot::Mutex;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::timeout;

use crate::failures::Failures;
use crate::server::Server;
use crate::signal::Signal;

/// Connections at once; for further ones the one goes that has said nothing for the longest time, and where there is none
/// they wait.
const CONNECTIONS: usize = 16;

/// How long a connection may take to say something, and as long again to ask its question.
const ASKING: Duration = Duration::from_secs(2);

/// How long a connection may take in all; each asks one question.
const TIMEOUT: Duration = Duration::from_secs(10);

impl Server {
    /// Answers `GET /metrics` on a TCP address with [`Server::prometheus`], until the server stops. Returns the actual
    /// address, which matters for port 0. Whoever can connect learns the names of exports and the addresses of clients:
    /// a loopback address is meant.
    ///
    /// # Errors
    /// What the host says, for instance that the address is in use.
    pub async fn listen_metrics(&self, address: SocketAddr) -> io::Result<SocketAddr> {
        self.serve_metrics(TcpListener::bind(address).await?.into_std()?)
    }

    /// The same on a socket that listens already. Within a tokio runtime.
    ///
    /// # Errors
    /// What the host says.
    pub fn serve_metrics(&self, listener: std::net::TcpListener) -> io::Result<SocketAddr> {
        listener.set_nonblocking(true)?;
        let listener = TcpListener::from_std(listener)?;
        let actual = listener.local_addr()?;
        let server = self.clone();
        tokio::spawn(async move {
            tokio::select! {
                () = server.stopping() => {}
                () = accept(&server, &listener) => {}
            }
        });
        Ok(actual)
    }
}

/// The connections that have said nothing yet, in their order, each with what ends it.
type Silent = Arc<Mutex<BTreeMap<u64, Signal>>>;

async fn accept(server: &Server, listener: &TcpListener) {
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    let silent = Silent::default();
    let mut failures = Failures::of("cannot accept a connection for metrics");
    for number in 0.. {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                failures.rest(&error).await;
                continue;
            }
        };
        if places.available_permits() == 0
            && let Some((_, oldest)) = silent.lock().pop_first()
        {
            oldest.raise();
        }
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        let (server, silent, over) = (server.clone(), Arc::clone(&silent), Signal::default());
        silent.lock().insert(number, over.clone());
        tokio::spawn(async move {
            let _place = place;
            // A look, because sockets may count as readable that are not.
            let spoke = over.bounds(timeout(ASKING, stream.peek(&mut [0]))).await;
            silent.lock().remove(&number);
            if matches!(spoke, Some(Ok(Ok(_)))) {
                tell(&server, stream).await;
            }
        });
    }
}

/// Answers what is asked on a connection.
async fn tell(server: &Server, stream: TcpStream) {
    let answer = service_fn(|request| {
        let response = answer(server, &request);
        async move { Ok::<_, Infallible>(response) }
    });
    let mut http = hyper::server::conn::http1::Builder::new();
    http.keep_alive(false).timer(TokioTimer::new()).header_read_timeout(ASKING);
    let asked = http.serve_connection(TokioIo::new(stream), answer);
    // Whatever goes wrong here concerns who asks alone.
    let _: Result<hyper::Result<()>, _> = timeout(TIMEOUT, asked).await;
}

fn answer(server: &Server, request: &Request<Incoming>) -> Response<Full<Bytes>> {
    let is_read = matches!(*request.method(), Method::GET | Method::HEAD);
    let (status, body) = match request.uri().path() {
        "/metrics" if is_read => (StatusCode::OK, server.prometheus()),
        "/metrics" => (StatusCode::METHOD_NOT_ALLOWED, "only GET\n".to_owned()),
        _ => (StatusCode::NOT_FOUND, "there is /metrics\n".to_owned()),
    };
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    let kind = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    response.headers_mut().insert(CONTENT_TYPE, kind);
    if status == StatusCode::METHOD_NOT_ALLOWED {
        response.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
    }
    response
}
