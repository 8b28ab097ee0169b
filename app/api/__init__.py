"""The HTTP shell: decodes, authorises, asks the service, encodes. No rule about sandboxes lives here."""
