"""A network with `nat:`: a bridge of its own, a packet filter that translates, and a dnsmasq."""
