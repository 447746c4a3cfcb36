"""Evidence that a VM runs protected, and its appraisal; offline, and with no key of a VM's."""
