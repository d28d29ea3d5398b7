//! The hub's REST interface, as a client sees it: addresses, the token, and refusals as errors. What is asked is the
//! business of `commands`.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, bail};
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use reqwest::{Method, Response};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::Global;
use crate::api::Problem;
use crate::http::auth::read_token;

/// Where the token lies when the hub runs on this host as a service.
const SERVICE_TOKEN: &str = "/var/lib/sendense/admin.token";

/// How long the hub may take to answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);

/// A connection to a hub.
pub(crate) struct Client {
    http: reqwest::Client,
    base: String,
    token: Option<String>,
}

impl Client {
    /// A client of the hub that the command line names.
    pub(super) fn new(global: &Global) -> anyhow::Result<Self> {
        Self::of(&global.hub, token(global.token_file.as_deref())?)
    }

    /// A client of the hub at `url`, with the token that it wants.
    pub(crate) fn of(url: &str, token: Option<String>) -> anyhow::Result<Self> {
        let base = url.trim_end_matches('/').to_owned();
        if !base.starts_with("http://") {
            bail!(
                "--hub {base}: only http:// is spoken for now; use it on loopback or through a tunnel"
            );
        }
        let http = reqwest::Client::builder()
            .timeout(ANSWER_TIMEOUT)
            .no_proxy()
            .build()
            .context("no HTTP client")?;
        Ok(Self { http, base, token })
    }

    /// Where the hub is.
    pub(super) fn base(&self) -> &str {
        &self.base
    }

    /// Whether requests carry a token.
    pub(super) fn has_token(&self) -> bool {
        self.token.is_some()
    }

    pub(crate) async fn get<T: DeserializeOwned>(
        &self,
        path: &str,
        query: &[(&str, &str)],
    ) -> anyhow::Result<T> {
        self.read(self.send(Method::GET, path, query, None::<&()>).await?).await
    }

    pub(crate) async fn post<B: Serialize, T: DeserializeOwned>(
        &self,
        path: &str,
        body: &B,
    ) -> anyhow::Result<T> {
        self.read(self.send(Method::POST, path, &[], Some(body)).await?).await
    }

    pub(crate) async fn patch<B: Serialize, T: DeserializeOwned>(
        &self,
        path: &str,
        body: &B,
    ) -> anyhow::Result<T> {
        self.read(self.send(Method::PATCH, path, &[], Some(body)).await?).await
    }

    pub(crate) async fn delete(&self, path: &str) -> anyhow::Result<()> {
        self.send(Method::DELETE, path, &[], None::<&()>).await.map(drop)
    }

    async fn read<T: DeserializeOwned>(&self, response: Response) -> anyhow::Result<T> {
        response.json().await.with_context(|| {
            format!("{} answers, but not as a Sendense hub of this version does", self.base)
        })
    }

    async fn send<B: Serialize>(
        &self,
        method: Method,
        path: &str,
        query: &[(&str, &str)],
        body: Option<&B>,
    ) -> anyhow::Result<Response> {
        let mut request =
            self.http.request(method, format!("{}/api/v1{path}", self.base)).query(query);
        if let Some(token) = &self.token {
            request = request.bearer_auth(token);
        }
        if let Some(body) = body {
            request = request.json(body);
        }
        let response = request.send().await.with_context(|| {
            format!(
                "the hub at {} does not answer; is sendense-hub serve running there?",
                self.base
            )
        })?;
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let detail = match response.json::<Problem>().await {
            Ok(problem) => problem.detail,
            Err(_) => status.to_string(),
        };
        if status == reqwest::StatusCode::UNAUTHORIZED {
            bail!("{detail}; name the file by --token-file or SENDENSE_TOKEN_FILE");
        }
        bail!("{detail}")
    }
}

/// The token: named, from the environment, or that of a hub that runs here as a service; none for a hub without
/// authentication.
fn token(file: Option<&Path>) -> anyhow::Result<Option<String>> {
    if let Some(file) = file {
        let token = read_token(file).with_context(|| format!("--token-file {}", file.display()))?;
        return Ok(Some(token));
    }
    if let Ok(token) = std::env::var("SENDENSE_TOKEN")
        && !token.is_empty()
    {
        return Ok(Some(token));
    }
    // One that is not there, or not for this user, is no error: the hub will say that it needs one.
    Ok(read_token(Path::new(SERVICE_TOKEN)).ok())
}

/// Any text as one segment of a path.
pub(crate) fn segment(text: &str) -> String {
    utf8_percent_encode(text, NON_ALPHANUMERIC).to_string()
}
