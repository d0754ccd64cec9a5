//! From where a request comes, when there may be proxies before us.

use std::net::IpAddr;
use std::str::FromStr;

use actix_web::HttpRequest;
use ipnet::IpNet;

/// The proxies whose `X-Forwarded-For` is believed; by default nobody's.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TrustedProxies(Vec<IpNet>);

/// A text that is no list of addresses and networks.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is neither an IP address nor a network such as 10.0.0.0/8")]
pub struct InvalidNetwork(String);

impl FromStr for TrustedProxies {
    type Err = InvalidNetwork;

    /// A comma list; empty is nobody.
    fn from_str(list: &str) -> Result<Self, InvalidNetwork> {
        let items = list.split(',').map(str::trim).filter(|item| !item.is_empty());
        let network = |item: &str| {
            let address = item.parse::<IpAddr>().map(IpNet::from);
            address.or_else(|_| item.parse()).map_err(|_| InvalidNetwork(item.to_owned()))
        };
        items.map(network).collect::<Result<_, _>>().map(Self)
    }
}

impl TrustedProxies {
    /// The address that asks; none on a connection without addresses.
    pub fn client(&self, request: &HttpRequest) -> Option<IpAddr> {
        let peer = request.peer_addr()?.ip().to_canonical();
        // The common case costs nothing.
        if self.0.is_empty() {
            return Some(peer);
        }
        let lines = request.headers().get_all("x-forwarded-for").map(|value| value.to_str());
        let lines: Vec<&str> = lines.map(Result::unwrap_or_default).collect();
        Some(self.behind(peer, &lines))
    }

    /// Each proxy appends whom it spoke to. Read from the end, the first that we do not trust is
    /// the client; what stands before it anybody could have written.
    fn behind(&self, peer: IpAddr, forwarded: &[&str]) -> IpAddr {
        let mut client = peer;
        for item in forwarded.iter().rev().flat_map(|line| line.rsplit(',')) {
            if !self.trusts(client) {
                break;
            }
            match item.trim().parse::<IpAddr>() {
                Ok(address) => client = address.to_canonical(),
                Err(_) => break,
            }
        }
        client
    }

    fn trusts(&self, address: IpAddr) -> bool {
        self.0.iter().any(|network| network.contains(&address))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn client(trusted: &str, peer: &str, forwarded: &[&str]) -> String {
        let proxies: TrustedProxies = trusted.parse().unwrap();
        proxies.behind(peer.parse().unwrap(), forwarded).to_string()
    }

    #[test]
    fn only_what_a_trusted_proxy_wrote_is_believed() {
        let inner = "10.0.0.0/8, ::1";
        assert_eq!(client("", "1.1.1.1", &["2.2.2.2"]), "1.1.1.1");
        assert_eq!(client(inner, "1.1.1.1", &["2.2.2.2"]), "1.1.1.1");
        assert_eq!(client(inner, "10.0.0.1", &["2.2.2.2"]), "2.2.2.2");
        assert_eq!(client(inner, "::1", &["9.9.9.9, 2.2.2.2, 10.0.0.7"]), "2.2.2.2");
        assert_eq!(client(inner, "10.0.0.1", &["9.9.9.9", "2001:db8::1"]), "2001:db8::1");
        assert_eq!(client(inner, "10.0.0.1", &["::ffff:2.2.2.2"]), "2.2.2.2");
    }

    #[test]
    fn nonsense_in_the_header_leaves_the_last_known_address() {
        for nonsense in ["", "unknown", "2.2.2.2:80, x", ","] {
            assert_eq!(client("10.0.0.1", "10.0.0.1", &[nonsense]), "10.0.0.1", "{nonsense}");
        }
    }

    #[test]
    fn what_is_no_network_is_named() {
        for bad in ["localhost", "10.0.0.0/33", "10.0.0.1,x"] {
            let item = bad.rsplit(',').next().unwrap();
            assert_eq!(bad.parse::<TrustedProxies>(), Err(InvalidNetwork(item.to_owned())));
        }
    }
}
