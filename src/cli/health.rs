//! `waltrail health`: what a container's health check runs.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use bytes::Bytes;
use clap::Args;
use http_body_util::{BodyExt, Empty, Limited};
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioExecutor;

use super::exit_code::Failure;
use super::tell::tell;
use super::{LISTEN_VARIABLE, listen_variable};
use crate::config::units::parse_address;

/// An answer that takes longer is none.
const TIMEOUT: Duration = Duration::from_secs(5);
/// Longer answers are cut off: a line for each database in trouble.
const ANSWER_LIMIT: usize = 64 * 1024;

/// Arguments of `health`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  waltrail health 127.0.0.1:9180
  HEALTHCHECK CMD [\"waltrail\", \"health\"]      in a Dockerfile, with WALTRAIL_LISTEN in the environment

Exit code 0 when /healthz says that all is well, 1 when it says otherwise, with the reason, or does not answer.")]
pub struct HealthArguments {
    /// Where the daemon serves health: what its --listen or [http] listen says [default: what WALTRAIL_LISTEN says]
    #[arg(value_parser = parse_address)]
    address: Option<SocketAddr>,
}

/// Asks a daemon whether all is well.
///
/// # Errors
/// When it is not, or nobody answers.
pub async fn run(arguments: HealthArguments) -> Result<(), Failure> {
    let told = arguments.address.map_or_else(listen_variable, |address| Ok(Some(address)))?;
    let Some(told) = told else {
        return Err(Failure::usage(format!("which address? Name it, or set {LISTEN_VARIABLE}")));
    };
    let address = reachable(told);
    let failed = |why: &dyn std::fmt::Display| Failure::other(format!("no daemon answers at {address}: {why}"));
    let client: Client<_, Empty<Bytes>> = Client::builder(TokioExecutor::new()).build_http();
    let url =
        format!("http://{address}/healthz").parse().map_err(|error: hyper::http::uri::InvalidUri| failed(&error))?;
    let answer = async {
        let response = client.get(url).await.map_err(|error| failed(&error))?;
        let status = response.status();
        let body = Limited::new(response.into_body(), ANSWER_LIMIT).collect().await.map_err(|error| failed(&error))?;
        Ok((status, String::from_utf8_lossy(&body.to_bytes()).trim_end().to_owned()))
    };
    match tokio::time::timeout(TIMEOUT, answer).await {
        Err(_) => Err(failed(&format_args!("it took longer than {TIMEOUT:?}"))),
        Ok(Ok((status, text))) if status.is_success() => {
            tell(text);
            Ok(())
        }
        Ok(Ok((_, text))) => Err(Failure::other(text)),
        Ok(Err(failure)) => Err(failure),
    }
}

/// A daemon that listens at every address is asked at the machine's own.
fn reachable(mut address: SocketAddr) -> SocketAddr {
    match address.ip() {
        IpAddr::V4(Ipv4Addr::UNSPECIFIED) => address.set_ip(Ipv4Addr::LOCALHOST.into()),
        IpAddr::V6(Ipv6Addr::UNSPECIFIED) => address.set_ip(Ipv6Addr::LOCALHOST.into()),
        _ => {}
    }
    address
}
