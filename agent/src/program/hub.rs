//! The hub's REST calls for agents: ask for a job, tell progress, tell the end. Each call is bounded in time; what the
//! answers lead to is decided elsewhere.

use std::path::Path;
use std::time::Duration;

use agent::{Event, RunReport};
use anyhow::{Context, Result, anyhow, bail};
use reqwest::{Client, RequestBuilder, Response, StatusCode, Url};
use serde::Deserialize;

/// How long one call may take.
const CALL_TIMEOUT: Duration = Duration::from_secs(10);
/// How long connecting may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How often the hub is asked whether a job's exports are ready.
const POLL_INTERVAL: Duration = Duration::from_millis(250);
/// How long a job may take to come to the step at which its agent is needed.
const READY_TIMEOUT: Duration = Duration::from_secs(300);
/// How often the end of a run is told before giving up, and how long between.
const END_ATTEMPTS: u32 = 5;
const END_PAUSE: Duration = Duration::from_secs(1);

/// What the hub wants done.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Assignment {
    status: String,
    #[serde(default)]
    step: Option<String>,
    #[serde(default)]
    pub(crate) nbd: Option<NbdAddress>,
    #[serde(default)]
    pub(crate) disks: Vec<AssignedDisk>,
}

/// Where the hub's NBD server listens for agents.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct NbdAddress {
    pub(crate) host: String,
    pub(crate) port: u16,
}

/// A disk of a job.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct AssignedDisk {
    pub(crate) disk_index: u32,
    pub(crate) disk_key: i64,
    #[serde(default)]
    pub(crate) full: bool,
    #[serde(default)]
    pub(crate) source: Option<String>,
    pub(crate) export_name: String,
    #[serde(default)]
    pub(crate) previous_change_id: Option<String>,
}

/// What the hub answers to progress.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wish {
    /// Go on.
    Continue,
    /// Stop: the job was cancelled, or has ended.
    Stop,
}

#[derive(Deserialize)]
struct ProgressAnswer {
    #[serde(default)]
    cancel: bool,
}

/// What the hub's problems look like, as far as people care.
#[derive(Deserialize)]
struct Problem {
    #[serde(default)]
    detail: String,
}

/// The hub does not want this agent to do the job: another one does, or it is over.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Turned(String);

/// The header by which the hub tells one run of an agent from another.
const AGENT_HEADER: &str = "sendense-agent";

/// A hub and one job of it.
#[derive(Clone, Debug)]
pub(crate) struct Hub {
    client: Client,
    /// Names this run, so that no second one works on the same job.
    agent: String,
    job: Url,
    host: String,
    token: Option<String>,
}

impl Hub {
    /// A job of the hub at `url`. Calls nobody.
    pub(crate) fn new(url: &str, token_file: Option<&Path>, job_id: &str) -> Result<Self> {
        let mut job: Url = url.parse().with_context(|| format!("--hub {url}"))?;
        let host = job.host_str().with_context(|| format!("--hub {url}: no host"))?;
        let host = host.trim_matches(['[', ']']).to_owned();
        job.path_segments_mut()
            .map_err(|()| anyhow!("--hub {url}: not a base URL"))?
            .pop_if_empty()
            .extend(["api", "v1", "backups", job_id]);
        let token = token_file.map(|path| {
            let text = std::fs::read_to_string(path)
                .with_context(|| format!("--token-file {}", path.display()))?;
            Ok::<_, anyhow::Error>(text.trim().to_owned())
        });
        let client = Client::builder()
            .timeout(CALL_TIMEOUT)
            .connect_timeout(CONNECT_TIMEOUT)
            .build()
            .context("the HTTP client")?;
        let agent = uuid::Uuid::new_v4().to_string();
        Ok(Self { client, agent, job, host, token: token.transpose()? })
    }

    /// The host of the hub's URL.
    pub(crate) fn host(&self) -> &str {
        &self.host
    }

    /// Waits until the job needs its agent, and returns what is to be done.
    pub(crate) async fn assignment(&self) -> Result<Assignment> {
        let waiting = async {
            loop {
                let answer = self.send(self.client.get(self.job.clone())).await?;
                let assignment: Assignment = answer.json().await.context("the hub's answer")?;
                match (assignment.status.as_str(), assignment.step.as_deref()) {
                    ("pending" | "running", Some("agent" | "monitor")) => return Ok(assignment),
                    ("pending" | "running", _) => tokio::time::sleep(POLL_INTERVAL).await,
                    (status, _) => bail!("the job is {status} already"),
                }
            }
        };
        let ready = tokio::time::timeout(READY_TIMEOUT, waiting).await;
        ready.unwrap_or_else(|_| {
            bail!("the job did not ask for its agent within {} s", READY_TIMEOUT.as_secs())
        })
    }

    /// Claims the job for this run, before anything is sent.
    ///
    /// # Errors
    /// [`Turned`] where the hub says that another agent has it, or that it is over. A hub that does not answer is no
    /// reason yet: progress will show whether it does.
    pub(crate) async fn claim(&self) -> Result<()> {
        let nothing: &[Event] = &[];
        let request = self.client.post(self.below("progress")).json(nothing);
        match self.authorised(request).send().await {
            Ok(answer) if answer.status() == StatusCode::CONFLICT => {
                let problem = answer.json::<Problem>().await;
                let detail = problem.map(|problem| problem.detail).unwrap_or_default();
                Err(Turned(detail).into())
            }
            _ => Ok(()),
        }
    }

    /// Tells what happened since the last call; nothing is a sign of life, too.
    pub(crate) async fn progress(&self, events: &[Event]) -> Result<Wish> {
        let request = self.client.post(self.below("progress")).json(events);
        let answer = self.authorised(request).send().await.context("the hub does not answer")?;
        if answer.status() == StatusCode::CONFLICT {
            return Ok(Wish::Stop);
        }
        let answer: ProgressAnswer =
            check(answer).await?.json().await.context("the hub's answer")?;
        Ok(if answer.cancel { Wish::Stop } else { Wish::Continue })
    }

    /// Tells that the run is complete. Only with this the hub may count it as a backup.
    pub(crate) async fn complete(&self, report: &RunReport) -> Result<()> {
        self.tell_end(|| self.client.post(self.below("complete")).json(report)).await
    }

    /// Tells that the run failed.
    pub(crate) async fn fail(&self, error: &str) -> Result<()> {
        let body = serde_json::json!({ "error": error });
        self.tell_end(|| self.client.post(self.below("fail")).json(&body)).await
    }

    /// Tries again while the hub is away; a refusal is final.
    async fn tell_end(&self, request: impl Fn() -> RequestBuilder) -> Result<()> {
        let mut attempt = 1;
        loop {
            match self.authorised(request()).send().await {
                Ok(answer) if !answer.status().is_server_error() => {
                    return check(answer).await.map(|_| ());
                }
                answer if attempt == END_ATTEMPTS => {
                    return check(answer.context("the hub does not answer")?).await.map(|_| ());
                }
                _ => {
                    attempt += 1;
                    tokio::time::sleep(END_PAUSE).await;
                }
            }
        }
    }

    async fn send(&self, request: RequestBuilder) -> Result<Response> {
        check(self.authorised(request).send().await.context("the hub does not answer")?).await
    }

    fn authorised(&self, request: RequestBuilder) -> RequestBuilder {
        let request = request.header(AGENT_HEADER, &self.agent);
        match &self.token {
            Some(token) => request.bearer_auth(token),
            None => request,
        }
    }

    fn below(&self, name: &str) -> Url {
        let mut url = self.job.clone();
        if let Ok(mut segments) = url.path_segments_mut() {
            segments.push(name);
        }
        url
    }
}

async fn check(answer: Response) -> Result<Response> {
    let status = answer.status();
    if status.is_success() {
        return Ok(answer);
    }
    let detail = answer.json::<Problem>().await.map(|problem| problem.detail).unwrap_or_default();
    match detail.as_str() {
        "" => bail!("the hub answers {status}"),
        detail => bail!("the hub answers {status}: {detail}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_go_below_the_job() {
        for url in ["http://h:8082", "http://h:8082/"] {
            let hub = Hub::new(url, None, "a/b").unwrap();
            assert_eq!(hub.below("fail").as_str(), "http://h:8082/api/v1/backups/a%2Fb/fail");
            assert_eq!(hub.host(), "h");
        }
        let behind = Hub::new("http://[::1]/sendense/", None, "j").unwrap();
        assert_eq!(behind.job.as_str(), "http://[::1]/sendense/api/v1/backups/j");
        assert_eq!(behind.host(), "::1");
        assert!(Hub::new("hub", None, "j").is_err());
        assert!(Hub::new("http://h", Some(Path::new("/nonexistent/token")), "j").is_err());
    }
}
